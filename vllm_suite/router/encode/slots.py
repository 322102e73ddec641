"""What became of each distinct item of a request: kept somewhere, on its way, in slices, or local."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import msgspec

from vllm_suite.encoded import Slice, slice_identifier
from vllm_suite.router.encode.call import Rejected
from vllm_suite.router.encode.flights import Flight
from vllm_suite.router.encode.known import Encoded
from vllm_suite.router.encode.parts import Item
from vllm_suite.router.errors import UpstreamFailure

_NOTHING = msgspec.Raw(b"null")


@dataclass(slots=True)
class Slot:
    """A distinct item of the request, or a slice of one.

    Remembered as kept, or on its way, or neither (then it is local). An item that is cut has `slices` in order, and
    neither of its own.
    """

    item: Item
    kept: Encoded | None = None
    flight: Flight | None = None
    slices: list[Slot] = field(default_factory=list)

    def cut(self, count: int) -> None:
        """Into so many slices."""
        item = self.item
        for index in range(count):
            piece = Slice(item.identity, index, count)
            name = slice_identifier(item.identity, index, count)
            tokens = max(item.tokens // count, 1)
            part = replace(item, identity=name, tokens=tokens, whole=item, piece=piece, raw=_NOTHING)
            self.slices.append(Slot(part))

    @property
    def leaves(self) -> list[Slot]:
        """What is looked up and sent: the slices, or the item itself."""
        return self.slices or [self]

    @property
    def result(self) -> Encoded | None:
        """Of a leaf: what there is by now."""
        return self.kept or (self.flight.encoded if self.flight is not None else None)

    @property
    def encoded(self) -> Encoded | None:
        """Where the whole item is, as far as known by now. An encoder may have had to encode it whole."""
        return next((one for leaf in self.leaves if (one := leaf.result) is not None and not one.of), None)

    @property
    def available(self) -> bool:
        """Whether all of it is somewhere by now, whole or in slices that make it up."""
        if self.encoded is not None:
            return True
        found = [leaf.result for leaf in self.slices]
        rows = [one.ref.tokens for one in found if one is not None]
        return len(rows) == len(found) > 1 and all(one is not None and one.of == sum(rows) for one in found)

    @property
    def under_way(self) -> bool:
        """Whether all of it that is not there may still come, and something is missing."""
        flights = [leaf.flight for leaf in self.leaves if leaf.result is None]
        return bool(flights) and all(flight is not None and not flight.landed.done() for flight in flights)

    @property
    def flying(self) -> bool:
        """Whether some encoder still works on it."""
        return any(leaf.flight is not None and not leaf.flight.landed.done() for leaf in self.leaves)

    @property
    def failure(self) -> UpstreamFailure | Rejected | None:
        """Why it cannot be had, as far as that is settled by now."""
        for leaf in self.leaves:
            if leaf.flight is not None and leaf.result is None and leaf.flight.failure is not None:
                return leaf.flight.failure
        if self.slices and not self.available and all(leaf.result is not None for leaf in self.slices):
            return UpstreamFailure("wrong_slices", "the encoders' slices do not make up the item")
        return None

    @property
    def outcome(self) -> str | None:
        """What became of a leaf: kept, encoded, left under way, or None for one that failed or was never sent."""
        if self.kept is not None:
            return "kept"
        if self.result is not None:
            return "encoded"
        return "left" if self.flying else None


def all_kept(slot: Slot) -> bool:
    """Whether nothing of the item had to be encoded for this request."""
    return all(leaf.kept is not None for leaf in slot.leaves)
