"""Who else is in a fleet when a request comes and when its first token does."""

from __future__ import annotations

from bisect import bisect_right


class Company:
    """Told of every request as it comes and as it leaves, in the order of the clock.

    A request that is answered in one step counts others that end in that step as company.
    """

    def __init__(self) -> None:
        # By arrival, as they come.
        self._inside: dict[int, float] = {}
        # Of those that left, in order: what matters is the earliest arrival among all that left after a moment.
        self._left: list[float] = []
        self._came: list[float] = []

    def came(self, number: int, arrival: float) -> None:
        """A request is in the fleet from now on."""
        self._inside[number] = arrival

    def left(self, number: int, first: float, last: float) -> bool:
        """A request has its last token: whether it was in company when it came, or when its first token did.

        Args:
            first, last: times of its first and last token.
        """
        arrival = self._inside.pop(number)
        found = self._others(arrival) or self._others(first)
        while self._came and self._came[-1] >= arrival:
            self._came.pop()
            self._left.pop()
        self._came.append(arrival)
        self._left.append(last)
        return found

    def _others(self, moment: float) -> bool:
        oldest = next(iter(self._inside.values()), None)
        if oldest is not None and oldest <= moment:
            return True
        index = bisect_right(self._left, moment)
        return index < len(self._left) and self._came[index] <= moment
