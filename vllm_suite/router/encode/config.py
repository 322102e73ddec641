"""Settings of the encode stage, the `encode` section of the router's file."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from vllm_suite.encoded import MAX_SLICES
from vllm_suite.router.settings import Bytes, Count, Seconds, Settings


def _network(text: str) -> str:
    return str(ip_network(text))


Port = Annotated[int, Field(ge=1, le=65_535)]
Modality = Literal["image", "audio", "video"]
Network = Annotated[str, AfterValidator(_network)]


class Fetch(Settings):
    """Media that a client names by an http(s) URL. Off by default: every such URL is then refused."""

    enabled: bool = False
    hosts: tuple[str, ...] = Field(
        default=(), description="only these hosts; one that begins with a dot stands for its subdomains; empty: any"
    )
    ports: tuple[Port, ...] = (80, 443)
    allowed_networks: tuple[Network, ...] = Field(
        default=(),
        description="networks that may be fetched from although they are not public, an object store of one's own; "
        "everything else that is private, link-local, loopback or a cloud's metadata service is refused",
    )
    max_redirects: Count = 3
    connect_timeout_s: Seconds = 2.0
    timeout_s: Seconds = Field(default=10.0, description="one item, redirects included")
    concurrency: Annotated[int, Field(ge=1)] = Field(default=16, description="downloads at a time in one router")


class Slices(Settings):
    """One large item over several encoders: tiles of a picture, frames of a film. Only of models whose encoder treats
    each for itself (the instances say which), and only where encoders have little else to do.
    """

    enabled: bool = True
    min_tokens: Annotated[int, Field(ge=2)] = Field(
        default=1024, description="an item of fewer rows, as predicted, stays whole"
    )
    slice_tokens: Annotated[int, Field(ge=1)] = Field(default=512, description="rows of a slice, at least")
    max_slices: Annotated[int, Field(ge=2, le=MAX_SLICES)] = Field(default=8, description="slices of one item")
    min_encoders: Annotated[int, Field(ge=2)] = Field(
        default=2, description="encoders with less to do than the item itself, without which it stays whole"
    )


class Encode(Settings):
    """The encode stage. Requests without media never reach it."""

    enabled: bool = Field(
        default=True,
        description="off: media parts pass as the client sent them, http(s) URLs and client uuids included",
    )
    policy: Literal["cache_affinity", "least_encode_tokens"] = Field(
        default="cache_affinity",
        description="which encoder gets an item: the one that its content points to unless that one is loaded, or "
        "the one with the fewest outstanding encode tokens",
    )
    load_factor: Annotated[float, Field(ge=1)] = Field(
        default=1.1, description="cache_affinity passes over an encoder that would hold more than this times the mean"
    )
    any_encodes: bool = Field(
        default=True, description="`any` instances encode where no instance has role `encode`; never for themselves"
    )
    metadata_only: tuple[Modality, ...] = Field(
        default=("image", "audio"),
        description="of these the media is left out for prefill and decode where the encoder's answer has what they "
        "need instead. Not safe for video of Qwen2.5-VL: the answer leaves out the film's time scale",
    )
    overlap: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="start prefill while items are still being encoded, its media sent along: for requests with "
        "several such items, always, or never. `auto` is `never` where `fallback` is `error`",
    )
    retries: Count = Field(default=1, description="further encoders tried for an item")
    fallback: Literal["local", "error"] = Field(
        default="local", description="after that: the instance that prefills encodes the item itself, or an error"
    )
    max_items: Annotated[int, Field(ge=1)] = Field(default=256, description="media parts in one request")
    item_bytes: Bytes = Field(default=32 * 1024 * 1024, description="one item, decoded")
    request_bytes: Bytes = Field(default=128 * 1024 * 1024, description="all items of a request, decoded")
    max_pixels: Annotated[int, Field(ge=1)] = Field(
        default=178_956_970, description="width times height that an image's header declares; vLLM's own default"
    )
    shard_items: Annotated[int, Field(ge=1)] = Field(default=8, description="items sent to an encoder in one call")
    outstanding_tokens: Annotated[int, Field(ge=1)] = Field(
        default=65_536, description="encode tokens (estimated) that one encoder works on at a time; more wait"
    )
    queue_s: Seconds = Field(default=10.0, description="how long items wait for an encoder")
    call_s: Seconds = Field(default=60.0, description="from sending items to an encoder until its whole answer")
    answer_bytes: Bytes = 16 * 1024 * 1024
    known_items: Count = Field(default=16_384, description="items remembered with where they are kept")
    probe_s: Seconds = Field(default=0.25, description="how long a producer may take to say which items it keeps")
    probe_hold_s: Seconds = Field(default=30.0, description="how long it is asked to keep those that it has")
    slices: Slices = Slices()
    fetch: Fetch = Fetch()
