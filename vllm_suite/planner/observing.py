"""What observers of a simulated run share: which pool an engine is in, and several observers at once."""

from __future__ import annotations

from vllm_suite.planner.plan import Plan, PoolPlan
from vllm_suite.planner.simulator.engine import Engine, Observer
from vllm_suite.planner.sources.steps import DecodeLine, Steps


class PoolOf:
    """An engine's pool. Engines are numbered through the pools of a plan; those that come later, by a change of role,
    from there on.
    """

    def __init__(self, plan: Plan) -> None:
        self._pools = [pool for pool in plan.pools for _ in range(pool.count * pool.parallel.dp)]
        self._by_role = {pool.role: pool for pool in plan.pools}

    def __call__(self, engine: Engine) -> PoolPlan:
        """The pool."""
        if engine.number < len(self._pools):
            return self._pools[engine.number]
        return self._by_role["prefill" if engine.prefill_only else "decode"]


class Both:
    """An observer that tells two others."""

    def __init__(self, first: Observer, second: Observer) -> None:
        self.first, self.second = first, second

    def __call__(
        self, engine: Engine, start: float, end: float, count: int, steps: Steps, line: DecodeLine | None
    ) -> None:
        """See `engine.Observer`."""
        self.first(engine, start, end, count, steps, line)
        self.second(engine, start, end, count, steps, line)
