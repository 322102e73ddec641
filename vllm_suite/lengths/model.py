"""The seam between who observes output lengths and who plans by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Key = str


class LengthModel(Protocol):
    """Distribution of output lengths by key. Lengths, ages and caps are output tokens of one sequence.

    `keys` go from the most specific to the least, for example ``["class:chat", "lora:a", "prompt:2048"]``; the
    global distribution is implied after the last. Calls take microseconds and are safe from any thread.
    """

    def observe(self, keys: Sequence[Key], tokens: int, *, censored: bool = False, now: float | None = None) -> None:
        """A sequence ended after `tokens`. Called once for each, by the scheduler or the router.

        Args:
            censored: it did not end by itself (length limit, abort, repetition stop): its length is more than `tokens`.
            now: seconds since the epoch; the wall clock where None.
        """
        ...

    def remaining(self, keys: Sequence[Key], age: int, cap: int) -> float | None:
        """``E[min(L, cap) - age | L > age]``: expected output tokens still to come of one that has made `age`.

        None where nothing has been observed at all.
        """
        ...

    def quantile(self, keys: Sequence[Key], q: float, age: int, cap: int) -> float | None:
        """The `q`-quantile (0 < q < 1) of the tokens still to come; None as in `remaining`."""
        ...
