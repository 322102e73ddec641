"""Settings of the router: one pydantic model for the YAML file, the command line and `FleetSpec`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, model_validator

from vllm_suite.fleet.predicted import PredictedSpec
from vllm_suite.fleet.slo import SloSpec
from vllm_suite.fleet.tracing import TracingSpec
from vllm_suite.lengths import LengthSettings
from vllm_suite.router.encode.config import Encode
from vllm_suite.router.settings import Bytes, Count, Seconds
from vllm_suite.router.settings import Settings as _Settings

Role = Literal["prefill", "decode", "encode", "any"]
PolicyName = Literal["round_robin", "least_tokens", "power_of_two", "prefix_hash"]


def _base_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"not an http(s) URL: {text!r}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("an instance URL has no credentials, query or fragment")
    return text.rstrip("/")


Url = Annotated[str, AfterValidator(_base_url)]


def _plain_key(key: SecretStr) -> SecretStr:
    # What a header cannot carry as it is would never match. An empty one would open the door to everybody.
    text = key.get_secret_value()
    if not text or text != text.strip() or not text.isprintable():
        raise ValueError("a key is not empty, has printable characters alone, and no spaces around them")
    return key


Key = Annotated[SecretStr, Field(json_schema_extra={"minLength": 1}), AfterValidator(_plain_key)]


class StaticTarget(_Settings):
    """One address to ask for an instance."""

    url: Url = Field(description="base URL, for example http://10.0.0.7:8000")
    role: Role = Field(default="any", description="used where the instance itself says `any`")


class DnsTarget(_Settings):
    """A name whose A records are the addresses of instances (a headless Service, for example)."""

    host: str = Field(min_length=1, description="name to resolve")
    port: int = Field(ge=1, le=65_535)
    role: Role = Field(default="any", description="used where the instance itself says `any`")
    scheme: Literal["http", "https"] = "http"


class ServiceTarget(_Settings):
    """A Kubernetes Service whose ready pods are instances, asked for at the API server."""

    service: str = Field(min_length=1, description="name of a Service in the router's own namespace")
    port: int = Field(ge=1, le=65_535, description="of the pods")
    role: Role = Field(default="any", description="used where the instance itself says `any`")
    scheme: Literal["http", "https"] = "http"


class Membership(_Settings):
    """Where instances are looked for, and how their identity and readiness are asked."""

    static: tuple[StaticTarget, ...] = ()
    withdrawn_file: Path | None = Field(
        default=None,
        description="addresses of `static`, one a line, that get no new work for now; read again and again. Written by "
        "`vllm-suite up`",
    )
    dns: tuple[DnsTarget, ...] = ()
    kubernetes: tuple[ServiceTarget, ...] = ()
    state: Literal["suite", "stock"] = Field(
        default="suite",
        description="`suite` asks /suite/v1/state; `stock` asks /health and /v1/models of a vLLM without the "
        "suite's endpoint plugin, where a restart shows only as a gap in its answers",
    )
    poll_interval_s: Seconds = 0.5
    poll_timeout_s: Seconds = 1.0
    forget_after_s: Seconds = Field(
        default=2.0, description="an instance that gave no good answer for so long is forgotten"
    )
    dns_interval_s: Seconds = 1.0

    @model_validator(mode="after")
    def _some_target(self) -> Membership:
        urls = [target.url for target in self.static]
        if len(set(urls)) != len(urls):
            raise ValueError("an address is listed twice in membership.static")
        return self


class Disaggregation(_Settings):
    """When a prompt is prefilled on another instance than the one that decodes it."""

    enabled: bool = True
    min_prompt_tokens: Count = Field(
        default=256, description="prompts with fewer uncached tokens (estimated) go straight to decode"
    )
    max_cached_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.75, description="a prompt of which more than this is likely cached goes straight to decode"
    )
    bytes_per_token: Annotated[float, Field(gt=0, le=64)] = Field(
        default=4.0, description="first guess for text; corrected from the usage that prefill reports"
    )
    chunk_tokens: Annotated[int, Field(ge=1)] = Field(default=128, description="granularity of the prefix history")
    history_chunks: Count = Field(default=65_536, description="prefix chunks remembered per instance")


class Policies(_Settings):
    """How an instance is picked, per stage."""

    prefill: PolicyName = "least_tokens"
    decode: PolicyName = "least_tokens"
    seed: int = Field(default=0, description="of the policies that draw")
    prefix_tokens: Annotated[int, Field(ge=1)] = Field(
        default=512, description="length of the prompt's start that prefix_hash keeps on one instance"
    )
    load_factor: Annotated[float, Field(ge=1)] = Field(
        default=1.25, description="prefix_hash passes an instance over that has more than this times the mean"
    )


class OutputLengths(_Settings):
    """Whether outstanding tokens are counted with the output that is expected rather than allowed."""

    learn: bool = Field(
        default=False,
        description="learn output lengths from the answers, by class, user, kind of request and model, and count an "
        "outstanding request with what it is expected to generate; otherwise with its max_tokens, or 256",
    )
    class_field: str = Field(
        default="dler_class", min_length=1, description="field of a request's vllm_xargs that names its class"
    )
    state_file: Path | None = Field(
        default=None, description="what was learned is saved here after the drain and read at the start"
    )
    estimator: LengthSettings = LengthSettings()


class Recovery(_Settings):
    """What is tried after a failure, always before the client has got its first byte."""

    prefill_retries: Count = Field(default=1, description="further prefill instances tried")
    prefill_fallback: Literal["decode", "error"] = Field(
        default="decode", description="after that: the decode instance computes the prompt itself, or an error"
    )
    decode_retries: Count = Field(default=1, description="further decode attempts")


class Timeouts(_Settings):
    """Seconds allowed per stage; each expiry is counted under the stage's name."""

    connect_s: Seconds = 2.0
    prefill_s: Seconds = Field(default=120.0, description="from sending to prefill until its whole answer")
    first_byte_s: Seconds = Field(default=300.0, description="from sending to decode until its first byte")
    idle_s: Seconds = Field(default=120.0, description="between two chunks of decode")
    client_s: Seconds = Field(default=60.0, description="a client that sends no body or takes no bytes")
    total_s: Seconds = Field(default=3600.0, description="whole request")
    drain_s: Seconds = Field(default=60.0, description="running requests after SIGTERM")


class Limits(_Settings):
    """What one router takes on."""

    body_bytes: Bytes = Field(default=32 * 1024 * 1024, description="of one request")
    total_body_bytes: Bytes = Field(
        default=1024 * 1024 * 1024,
        description="of all requests whose answer has not begun, together; the next one is answered 429",
    )
    header_bytes: Bytes = Field(default=16_384, description="of one header line")
    header_count: Annotated[int, Field(ge=8)] = 100
    outstanding_requests: Annotated[int, Field(ge=1)] = 4096
    retry_after_s: Annotated[int, Field(ge=1)] = Field(default=1, description="sent with 429 and 503")
    wait_for_instance_s: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="how long a request waits for an instance when none is ready"
    )
    buffered_answer_bytes: Bytes = Field(
        default=4 * 1024 * 1024,
        description="an unstreamed answer up to this size is read whole before the client gets a byte, so that "
        "decode may still be retried",
    )
    prefill_answer_bytes: Bytes = 16 * 1024 * 1024

    @model_validator(mode="after")
    def _room_for_one(self) -> Limits:
        if self.total_body_bytes < self.body_bytes:
            raise ValueError(
                f"limits.total_body_bytes ({self.total_body_bytes}) is less than limits.body_bytes "
                f"({self.body_bytes}), so a request of that size could never come in"
            )
        return self


class Auth(_Settings):
    """Keys. Each may also come from a file or from an environment variable."""

    api_keys: tuple[Key, ...] = Field(default=(), description="VLLM_SUITE_API_KEY adds one")
    api_key_file: Path | None = Field(default=None, description="one key a line")
    upstream_api_key: Key | None = Field(default=None, description="sent to the instances; VLLM_SUITE_UPSTREAM_API_KEY")
    upstream_api_key_file: Path | None = None
    control_key: Key | None = Field(
        default=None,
        description="for /suite/v1 routes, here and on the instances (there the upstream key is the fallback, "
        "here the API keys are); VLLM_SUITE_CONTROL_KEY",
    )
    control_key_file: Path | None = None
    forward_authorization: bool = Field(
        default=False, description="send the client's Authorization on in place of the upstream key"
    )


class RouterConfig(_Settings):
    """Everything `vllm-suite router` and `create_app` need."""

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65_535, description="0 takes a free port")
    membership: Membership = Membership()
    disaggregation: Disaggregation = Disaggregation()
    policies: Policies = Policies()
    encode: Encode = Encode()
    lengths: OutputLengths = OutputLengths()
    recovery: Recovery = Recovery()
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    auth: Auth = Auth()
    slo: SloSpec = Field(default=SloSpec(), description="requests within it are counted as good")
    predicted: PredictedSpec | None = Field(default=None, description="exported beside what is measured")
    tracing: TracingSpec | None = Field(default=None, description="send OpenTelemetry spans of requests to a collector")
    trust_transfer_params: bool = Field(
        default=False,
        description="let clients send kv_transfer_params and ec_transfer_params; only behind another router",
    )
