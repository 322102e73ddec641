"""Whether a new plan is worth the change: what it gains within the time it is kept, and what the change costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace

from vllm_suite.planner.plan import Plan, PoolPlan, Role


@dataclass(frozen=True)
class Change:
    """From one plan to another.

    Attributes:
        lines: one for each pool that differs, readable.
        engines: that have to be started anew, with the role or settings that they have then.
        gpus: of them.
    """

    lines: tuple[str, ...]
    engines: int
    gpus: int


def difference(old: Plan, new: Plan) -> Change:
    """What has to be done. Where engines stand is not compared: a fleet file does not move an engine."""
    lines = []
    for role in dict.fromkeys([pool.role for pool in (*old.pools, *new.pools)]):
        before, after = old.pool(role), new.pool(role)
        if before is None or after is None:
            pool = before or after
            assert pool is not None
            lines.append(f"{'+' if before is None else '-'} {pool.name}")
        elif changes := _changes(before, after):
            lines.append(f"~ {role}: {', '.join(changes)}")
    have, want = _engines(old), _engines(new)
    fresh = want - have
    return Change(tuple(lines), sum(fresh.values()), sum(pool.parallel.gpus * count for pool, count in fresh.items()))


def _changes(before: PoolPlan, after: PoolPlan) -> list[str]:
    shown = [field.name for field in fields(PoolPlan) if field.name not in ("role", "ranks", "kv_blocks")]
    return [f"{name} {getattr(before, name)} -> {getattr(after, name)}" for name in shown
            if getattr(before, name) != getattr(after, name)]  # fmt: skip


def _engines(plan: Plan) -> Counter[PoolPlan]:
    return Counter({replace(pool, count=1, ranks=(), kv_blocks=None): pool.count for pool in plan.pools})


@dataclass(frozen=True)
class Decision:
    """Keep, or change, and why.

    Attributes:
        change: whether to.
        reason: readable.
        gained, lost: requests within their targets, over the horizon and during the change.
    """

    change: bool
    reason: str
    gained: float = 0.0
    lost: float = 0.0


def decide(
    old: Plan,
    new: Plan,
    *,
    rate: float,
    old_goodput: float,
    new_goodput: float,
    restart_s: float = 120.0,
    horizon_s: float = 3600.0,
    margin: float = 0.1,
    roles: dict[Role, float] | None = None,
) -> Decision:
    """Whether to go from one plan to another.

    Nothing changes while the old plan holds the rate with the margin: that is the hysteresis, since the new plan has to
    hold it with twice the margin, or gain the margin. While engines restart their share of the fleet serves nothing.

    Args:
        rate: requests per second that come now.
        old_goodput, new_goodput: that each plan serves within the targets, on the traffic as it is now.
        restart_s: seconds until an engine that is started anew takes work.
        horizon_s: seconds that the new plan is expected to be kept.
        margin: share by which a plan's goodput is to exceed the rate, and by which a change has to be better.
        roles: seconds in place of `restart_s` for engines of a role.
    """
    change = difference(old, new)
    if not change.lines:
        return Decision(False, "the plan that is running is still the best one")
    if old_goodput >= rate * (1 + margin):
        return Decision(False, f"the running plan holds {old_goodput:.4g} requests/s, {rate:.4g} come")
    if new_goodput < old_goodput * (1 + margin) and new_goodput < rate * (1 + 2 * margin):
        return Decision(False, f"the best plan holds {new_goodput:.4g} requests/s, the running one {old_goodput:.4g}")
    served, better = min(rate, old_goodput), min(rate, new_goodput)
    if roles:
        fresh = _engines(new) - _engines(old)
        down = sum(pool.parallel.gpus * count * roles.get(pool.role, restart_s) for pool, count in fresh.items())
    else:
        down = change.gpus * restart_s
    lost = served * min(1.0, down / (max(1, old.gpus) * horizon_s)) * horizon_s
    # Room beyond what comes serves nobody, so it is no gain.
    gained = (better - served) * horizon_s
    if gained <= lost:
        return Decision(False, f"{gained:.0f} more requests within {horizon_s:g} s are not worth the {lost:.0f} that"
                        " the change costs", gained, lost)  # fmt: skip
    return Decision(True, f"{gained:.0f} more requests within {horizon_s:g} s, at a cost of {lost:.0f}", gained, lost)
