"""What is asked of a fleet: requests with arrivals, lengths, shared prefixes and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Item:
    """A picture, a sound or a film of a request.

    Attributes:
        kind: for example ``1920x1080``; items of one kind cost the same, so an encoder's time is looked up once for it.
        tokens: that it takes in the prompt; `Request.prompt` contains them.
        content: equal content is encoded once while it is cached; None for content of its own.
        flops: operations of the encoder, summed over its layers.
        pieces: parts that may be encoded on different encoders (tiles, groups of frames).
        at: where it stands in the prompt, in tokens before it; None right after the item before it, and for the first
            one at the start.
    """

    kind: str
    tokens: int
    flops: float = 0.0
    content: int | None = None
    pieces: int = 1
    at: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One request. Seconds and tokens.

    Attributes:
        number: unique.
        arrival: seconds from the start of the trace.
        prompt, output: at least 1; `prompt` with the tokens of `items`.
        prefix: ids of the blocks of `block` tokens that the prompt begins with; equal ids are equal content.
        label: class, for length-aware order.
    """

    number: int
    arrival: float
    prompt: int
    output: int
    prefix: tuple[int, ...] = ()
    block: int = 512
    items: tuple[Item, ...] = ()
    label: str = ""


def positions(items: Sequence[Item]) -> list[int]:
    """Tokens of the prompt before each item.

    Raises:
        ValueError: items that overlap, or are not in the order of the prompt.
    """
    found, free = list[int](), 0
    for item in items:
        begin = free if item.at is None else item.at
        if begin < free:
            raise ValueError(f"an item stands at token {begin} of the prompt, where the one before it ends at {free}")
        found.append(begin)
        free = begin + item.tokens
    return found
