"""Where a request says that its items are, read with care: the dictionary comes from outside.

Nothing is asked over the network here. What passes these checks names a place that the fleet's key has signed, or,
without a key, one that whoever may set ``ec_transfer_params`` has chosen: a router that takes them from clients
strips them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import msgspec

from vllm_epd.messages import SliceSource
from vllm_suite.compat.fence import ec_layout_digest, model_digest
from vllm_suite.encoded import (
    ERROR_KEY,
    ITEM_KEY,
    MAX_SLICES,
    PENDING_KEY,
    SLICES_KEY,
    Pending,
    item_content,
    item_location,
    slice_identifier,
)
from vllm_suite.handoff import Handoff, Refusal, parse

MAX_CANDIDATES = 16
# Identifiers and references travel in packets of the control link, and into log lines.
MAX_IDENTIFIER = 1024
MAX_SOURCE_BYTES = 16 << 10


def usable(identifier: str) -> bool:
    """Whether an identifier, which a client may have chosen, is one that instances can exchange."""
    return 0 < len(identifier) <= MAX_IDENTIFIER and identifier.isprintable()


def sound_metadata(feature: Any) -> bool:
    """Whether the numbers that size a feature's placeholder are such as a processor makes.

    vLLM's front end takes them from clients unseen, and its workers end at others.
    """
    for key, value in (feature.data or {}).items():
        grid = value.data
        if not key.endswith("grid_thw") or not hasattr(grid, "is_floating_point"):
            continue
        whole = not (grid.is_floating_point() or grid.is_complex())
        if not (whole and grid.numel() == 3 and grid.dim() == 1 and bool((grid > 0).all())):
            return False
    return True


@dataclass(frozen=True, slots=True)
class Source:
    """One usable source: a reference, or producers that are about to have the item, or its slices in order."""

    ref: Handoff | None = None
    pending: Pending | None = None
    slices: tuple[SliceSource, ...] = ()

    @property
    def key(self) -> str:
        """Equal for equal sources."""
        return msgspec.json.encode(self.ref or self.pending or self.slices).decode()

    @property
    def wait_s(self) -> float | None:
        """How long the item may take to be made; None where all of it is."""
        pending = (self.pending, *(one.pending for one in self.slices))
        return max((one.wait_s for one in pending if one is not None), default=None)


class OwnView:
    """What this engine expects of references made for it; computed once.

    Args:
        key: the fleet's signing key, or None.
    """

    def __init__(self, vllm_config: Any, key: bytes | None) -> None:
        self.model = model_digest(vllm_config)
        self.layout = ec_layout_digest(vllm_config)
        self.key = key

    def source(self, params: Any, identifier: str, rows: int) -> Source | Refusal | None:
        """Read what a request says about one item.

        Args:
            params: the request's ``ec_transfer_params``, of any type.
            rows: embedding rows that the request needs.

        Returns:
            None where it says nothing about the item; a refusal where what it says cannot be used.
        """
        if not isinstance(params, dict) or identifier not in params:
            return None
        entry = params[identifier]
        if not isinstance(entry, dict) or not usable(identifier):
            return Refusal.MALFORMED
        named = entry.get(SLICES_KEY)
        source = self._slices(named, identifier, rows) if named is not None else self._one(entry, identifier, rows)
        if isinstance(source, Source) and len(source.key) > MAX_SOURCE_BYTES:
            return Refusal.MALFORMED
        return source

    def _one(self, entry: dict[str, Any], identifier: str, rows: int | None) -> Source | Refusal:
        """What is said of an item, or of a slice; ``rows`` is None where any number will do."""
        if entry.get(ITEM_KEY) is not None:
            ref = parse(entry[ITEM_KEY])
            if isinstance(ref, Refusal):
                return ref
            return self._refuse_ref(ref, identifier, rows) or Source(ref)
        if entry.get(PENDING_KEY) is not None:
            return self._pending(entry[PENDING_KEY], identifier)
        return known_refusal(entry[ERROR_KEY]) if ERROR_KEY in entry else Refusal.UNFENCED

    def _slices(self, entries: Any, identifier: str, rows: int) -> Source | Refusal:
        """Slices in order. Each says by its identifier whose it is and where it belongs, so their order is checked."""
        if not isinstance(entries, list) or not 1 < len(entries) <= MAX_SLICES:
            return Refusal.MALFORMED
        slices: list[SliceSource] = []
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict):
                return Refusal.MALFORMED
            name = slice_identifier(identifier, index, len(entries))
            one = self._one(entry, name, None)
            if isinstance(one, Refusal):
                return one
            slices.append(SliceSource(name, one.ref, one.pending))
        known = [one.ref.tokens for one in slices if one.ref is not None]
        if min(known, default=1) < 1 or sum(known) + len(slices) - len(known) > rows:
            return Refusal.WRONG_SHAPE
        if len(known) == len(slices) and sum(known) < rows:
            return Refusal.TRUNCATED
        return Source(slices=tuple(slices))

    def _refuse_ref(self, ref: Handoff, identifier: str, rows: int | None) -> Refusal | None:
        if refusal := ref.check_signature(self.key):
            return refusal
        if ref.model != self.model:
            return Refusal.FOREIGN_MODEL
        if ref.layout != self.layout:
            return Refusal.FOREIGN_LAYOUT
        if ref.content != item_content(identifier):
            return Refusal.FOREIGN_CONTENT
        if ref.location != item_location(identifier, ref.claim_host, ref.claim_port):
            return Refusal.TAMPERED
        if rows is not None and ref.tokens != rows:
            return Refusal.TRUNCATED if ref.tokens < rows else Refusal.WRONG_SHAPE
        return None

    def _pending(self, raw: Any, identifier: str) -> Source | Refusal:
        try:
            pending = msgspec.convert(raw, Pending, strict=True)
        except msgspec.ValidationError:
            return Refusal.MALFORMED
        places = pending.candidates
        ports = all(0 < place.port < 65536 and place.host for place in places)
        if not (0 < len(places) <= MAX_CANDIDATES and ports and math.isfinite(pending.wait_s) and pending.wait_s > 0):
            return Refusal.MALFORMED
        if not pending.right_signature(self.key):
            return Refusal.BAD_SIGNATURE
        if pending.identifier != identifier:
            return Refusal.FOREIGN_CONTENT
        return Source(pending=pending)


def known_refusal(value: Any) -> Refusal:
    """Somebody else's word for why there is no item; ``MALFORMED`` where it is none of ours."""
    try:
        return Refusal(value)
    except ValueError:
        return Refusal.MALFORMED
