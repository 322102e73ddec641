"""What happens when in a soak: faults drawn from a seed, and nothing else, so that a seed can be run again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["kill", "restart", "freeze", "switch"]

ROUTER = "router"
_WEIGHTS: dict[Kind, int] = {"freeze": 40, "switch": 25, "kill": 20, "restart": 15}
_ROLES = ("prefill", "decode", "any")
# A membership forgets a silent instance after 2 s; a stream survives `idle_s`. Both sides of the first are wanted.
_FREEZE_S = (0.3, 8.0)
# Ends of processes stop here, so that there are long lives in which a leak has time to show.
LIVES_FROM = 0.55


@dataclass(frozen=True)
class Event:
    """One fault. `at_s` counts from the start of the load; `seconds` is a freeze's length, `role` a switch's target."""

    at_s: float
    kind: Kind
    target: str
    seconds: float = 0.0
    role: str = ""

    def document(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def schedule(
    seed: int, seconds: float, instances: Sequence[str], switchable: Sequence[str], gap_s: tuple[float, float]
) -> list[Event]:
    """The faults of a run, in order of time; equal arguments give equal faults.

    The router is restarted twice in a run of some minutes (killed once, ended once), instances as they are drawn. The
    last fault leaves time for what it sets off.

    Args:
        instances: names that can be ended and frozen.
        switchable: those among them that can change their role.
        gap_s: least and longest pause between two faults.
    """
    rng = random.Random(f"schedule {seed}")
    kinds = [kind for kind in _WEIGHTS if kind != "switch" or switchable]
    events: list[Event] = []
    at_s = rng.uniform(*gap_s)
    while at_s < seconds - gap_s[1]:
        [kind] = rng.choices(kinds, [_WEIGHTS[kind] for kind in kinds])
        if kind in ("kill", "restart") and at_s > LIVES_FROM * seconds:
            kind = "freeze"
        target = rng.choice(list(switchable if kind == "switch" else instances))
        length = round(rng.uniform(*_FREEZE_S), 2) if kind == "freeze" else 0.0
        role = rng.choice(_ROLES) if kind == "switch" else ""
        events.append(Event(round(at_s, 2), kind, target, length, role))
        at_s += rng.uniform(*gap_s)
    if seconds >= 120:
        at = [round(rng.uniform(*part) * seconds, 2) for part in ((0.1, 0.2), (0.3, 0.4))]
        events += [Event(at[0], "kill", ROUTER), Event(at[1], "restart", ROUTER)]
    return sorted(events, key=lambda event: event.at_s)
