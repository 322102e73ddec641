"""The longest of an engine's steps since any earlier one: what a decoding job's longest gap between tokens is."""

from __future__ import annotations

from bisect import bisect_right


class LongestSteps:
    """Of the steps so far only those that no later one is longer than: few, and enough to answer for every suffix."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._seconds: list[float] = []

    def add(self, step: int, seconds: float) -> None:
        """The longest of the steps up to before `step`, from the one given last on."""
        kept = self._seconds
        while kept and kept[-1] <= seconds:
            kept.pop()
            self._steps.pop()
        kept.append(seconds)
        self._steps.append(step)

    def since(self, step: int) -> float:
        """Seconds of the longest step from `step` on, which has to be one that was given to `add`; 0 for none."""
        index = bisect_right(self._steps, step)
        return self._seconds[index] if index < len(self._seconds) else 0.0

    def clear(self) -> None:
        """Forget all."""
        self._steps.clear()
        self._seconds.clear()
