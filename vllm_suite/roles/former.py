"""The roles that instances had before they were restarted, as one controller has seen them."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_suite.identity import Role
from vllm_suite.roles.seen import Seen

FORGET_S = 3600.0
"""One that was away for longer is a new one. Pods get new names, so their old ones have to go some time."""


class Former:
    """One controller's memory of roles, whoever gave them."""

    def __init__(self) -> None:
        self._had: dict[str, tuple[Role, float]] = {}

    def see(self, fleet: Sequence[Seen], now: float) -> None:
        """One look at the fleet, or at a part of it; `now` in seconds."""
        for one in fleet:
            if one.role != "any":
                self._had[one.instance_id] = one.role, now
            elif one.role_epoch:
                # No new life has switched yet: somebody has made this one `any`.
                self.forget(one)
        self._had = {name: (role, at) for name, (role, at) in self._had.items() if now - at <= FORGET_S}

    def of(self, one: Seen) -> Role | None:
        """The role of an instance's last life, where it has none in this one."""
        return self._had[one.instance_id][0] if one.role == "any" and one.instance_id in self._had else None

    def forget(self, one: Seen) -> None:
        """It is not asked for again."""
        self._had.pop(one.instance_id, None)

    def clear(self) -> None:
        """What was seen so far is out of date; those that have a role are seen with it at the next look."""
        self._had.clear()
