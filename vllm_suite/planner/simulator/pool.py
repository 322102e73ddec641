"""Engines that share their arrivals, and one call that simulates a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.engine import Engine, Limits, Observer
from vllm_suite.planner.simulator.jobs import Job, SimulationError, WaitingQueue
from vllm_suite.planner.simulator.lockstep import Lockstep
from vllm_suite.planner.sources.base import LatencySource

# Which engine takes a job that arrives now.
Route = Callable[[Sequence[Engine], Job, float], Engine]


def least_loaded(engines: Sequence[Engine], job: Job, now: float) -> Engine:
    """The engine with the least 4 x waiting + running, the first of equals: how vLLM balances data-parallel engines.

    vLLM's front end sees counts up to 100 ms old; here they are those of the moment.
    """
    return min(engines, key=lambda engine: 4 * len(engine.waiting) + len(engine.running))


class Pool:
    """Engines of one role. What follows an engine's last token is the `finished` that the engines were made with."""

    def __init__(self, engines: Sequence[Engine], route: Route = least_loaded) -> None:
        if not engines:
            raise SimulationError("a pool needs at least one engine")
        self.engines, self.route = engines, route

    def accept(self, job: Job, now: float) -> None:
        """A job arrives."""
        engine = self.engines[0] if len(self.engines) == 1 else self.route(self.engines, job, now)
        engine.accept(job, now)


def simulate(
    jobs: Iterable[Job],
    source: LatencySource,
    limits: Limits,
    finished: Callable[[Job, float], None],
    *,
    engines: int = 1,
    route: Route = least_loaded,
    ranks: int = 1,
    queue: Callable[[], WaitingQueue] | None = None,
    observer: Observer | None = None,
) -> Pool:
    """Run colocated engines on a trace until every job is complete.

    Args:
        jobs: in order of arrival; drawn as the clock reaches them.
        finished: a sink, e.g. `Records` or `Summary`.
        ranks: data-parallel ranks of each engine, in lockstep; arrivals are routed to ranks.
        queue: makes each engine's waiting queue; first come, first served by default.

    Returns:
        The engines, or their ranks, for their counters.

    Raises:
        SimulationError: arrivals out of order, or a job that no engine can hold.
    """
    clock = Clock()
    groups = [Lockstep(clock) if ranks > 1 else None for _ in range(engines)]
    made = [
        Engine(
            clock,
            source,
            limits,
            finished,
            number=index,
            waiting=queue() if queue else None,
            observer=observer,
            lockstep=groups[index // ranks],
        )
        for index in range(engines * ranks)
    ]
    pool = Pool(made, route)
    clock.feed(jobs, pool.accept)
    clock.run()
    return pool
