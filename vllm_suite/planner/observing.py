"""What observers of a simulated run share: which pool an engine is in, and several observers at once."""

from __future__ import annotations

from vllm_suite.planner.plan import Plan, PoolPlan
from vllm_suite.planner.simulator.encoders import EncodeObserver, Encoder
from vllm_suite.planner.simulator.engine import Engine, Observer
from vllm_suite.planner.simulator.instances import Hosted
from vllm_suite.planner.simulator.jobs import SimulationError
from vllm_suite.planner.sources.steps import DecodeLine, Steps


class PoolOf:
    """An engine's pool, as the plan has it."""

    def __init__(self, plan: Plan) -> None:
        self._by_role = {pool.role: pool for pool in plan.pools}

    def __call__(self, engine: Engine) -> PoolPlan:
        """The pool.

        Raises:
            SimulationError: the engine is not one of a fleet.
        """
        if not isinstance(engine, Hosted):
            raise SimulationError(f"engine {engine.number} is in no pool: only engines of `simulate_plan` are")
        return self._by_role[engine.pool.role]


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

    def encoded(self, encoder: Encoder, start: float, end: float, items: int) -> None:
        """See `EncodeObserver`; for those that are one."""
        for each in (self.first, self.second):
            if isinstance(each, EncodeObserver):
                each.encoded(encoder, start, end, items)
