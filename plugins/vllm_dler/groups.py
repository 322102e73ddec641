"""Samples of one prompt as one unit of work: who of them starts first, and when enough of them have finished.

A group waits for its slowest sample, or for the ``k``-th where the client asked for ``k`` of ``n``. All samples share
the group's deadline, so none of them is left behind; the first one starts early, because its length says most of
the others'; of samples that differ, the longest expected one goes first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from vllm_dler.order import Tracked


class Group:
    """Unfinished samples of one prompt, and the lengths of finished ones.

    Attributes:
        deadline: smallest key of any sample but the probe.
        lengths: tokens of samples that ended by themselves.
        stop_after: samples that the client wants; None for all.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.members: dict[str, Tracked] = {}
        self.deadline = math.inf
        self.lengths: list[int] = []
        self.stop_after: int | None = None
        self.probe: Tracked | None = None

    def share(self, state: Tracked, lowest: float) -> bool:
        """Let the group's deadline and the sample's key take the smaller of each other; whether the group's fell.

        Never below what the sample's own key could be, its arrival plus ``lowest``: who joins an old group does not
        inherit its age.
        """
        fell = False
        if state is not self.probe and state.key < self.deadline:
            self.deadline = state.key
            fell = True
        state.deadline = min(state.deadline, max(state.arrival + lowest, self.deadline))
        return fell

    def enough(self) -> bool:
        """Whether as many samples have ended by themselves as the client asked for."""
        return self.stop_after is not None and len(self.lengths) >= self.stop_after


class Groups:
    """Groups that have an unfinished sample."""

    def __init__(self, probes: bool, stop_after: bool) -> None:
        self._probes = probes
        self._heed_stop = stop_after
        self._groups: dict[str, Group] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def join(self, name: str, state: Tracked, stop_after: int | None) -> Group:
        """Enter a sample, the first one as the group's probe where there are any."""
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = Group(name)
            group.probe = state if self._probes else None
        group.members[state.request.request_id] = state
        if self._heed_stop and stop_after is not None:
            group.stop_after = min(stop_after, group.stop_after or stop_after)
        state.group = group
        return group

    def leave(self, state: Tracked, tokens: int | None) -> Iterable[str]:
        """A sample ended, by itself after ``tokens`` (None where it was cut). Returns ids of samples to stop now."""
        group = state.group
        if group is None:
            return ()
        group.members.pop(state.request.request_id, None)
        if tokens is not None:
            group.lengths.append(tokens)
        if not group.members:
            self._groups.pop(group.name, None)
        return tuple(group.members) if group.enough() else ()
