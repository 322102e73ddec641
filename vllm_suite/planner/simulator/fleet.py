"""A whole fleet on a virtual clock: every pool of a plan, the router before them, and what goes between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from vllm_suite.planner.plan import Plan, PlanError, Role
from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.engine import Engine, Observer
from vllm_suite.planner.simulator.jobs import Job
from vllm_suite.planner.simulator.pool import Pool
from vllm_suite.planner.simulator.served import Served, Sink
from vllm_suite.planner.simulator.setting import Setting
from vllm_suite.planner.workload import Request


@dataclass(frozen=True)
class PoolRun:
    """Counters of a pool, one entry for each engine where there are several.

    Attributes:
        busy: seconds in steps.
        steps: engine steps; of encoders, batches.
        preemptions: of jobs, in all engines.
        blocks: of cache of one engine; 0 for encoders.
        kv_mean, kv_max: share of the pool's blocks that were taken: the mean over time, and the most.
        transfers, transfer_bytes, transfer_seconds: what the pool's engines pulled; seconds summed over pulls.
    """

    busy: tuple[float, ...]
    steps: tuple[int, ...]
    preemptions: int = 0
    blocks: int = 0
    kv_mean: float = 0.0
    kv_max: float = 0.0
    transfers: int = 0
    transfer_bytes: float = 0.0
    transfer_seconds: float = 0.0


@dataclass(frozen=True)
class FleetRun:
    """What a simulation counted beside its requests.

    Attributes:
        end: seconds until the last request was done.
        pools: by role.
    """

    end: float
    pools: Mapping[Role, PoolRun]


def simulate_plan(
    plan: Plan,
    setting: Setting,
    requests: Iterable[Request],
    sink: Sink,
    *,
    observer: Observer | None = None,
    switching: Callable[..., object] | None = None,
) -> FleetRun:
    """Run a fleet on a trace until every request is done.

    Args:
        requests: in order of arrival; drawn as the clock reaches them.
        sink: called with each finished request.
        observer: sees every run of steps of every engine.
        switching: a policy that moves engines between roles.

    Raises:
        SimulationError: arrivals out of order, or a request that no engine can hold.
        PlanError: a pool that cannot be run.
    """
    pool = plan.pool("any")
    if pool is None or len(plan.pools) > 1 or switching is not None:
        raise PlanError(f"{plan.name}: only a plan of one pool `any` is simulated so far")
    clock, limits, source = Clock(), setting.limits(pool), setting.source(pool)
    labels: dict[int, str] = {}

    def finished(job: Job, now: float) -> None:
        sink(
            Served(
                job.number,
                job.arrival,
                job.prompt,
                job.output,
                labels.pop(job.number),
                prefill_start=job.first_scheduled,
                prefilled=job.first_token,
                first_token=job.first_token,
                last_token=job.last_token,
                longest_gap=job.longest_gap,
                preemptions=job.preemptions,
            )
        )

    def jobs() -> Iterable[Job]:
        for request in requests:
            labels[request.number] = request.label
            yield Job(request.number, request.arrival, request.prompt, request.output)

    queue = setting.queue
    engines = [
        Engine(clock, source, limits, finished, number=index, waiting=queue() if queue else None, observer=observer)
        for index in range(pool.count)
    ]
    clock.feed(jobs(), Pool(engines).accept)
    clock.run()
    run = PoolRun(
        tuple(engine.busy for engine in engines),
        tuple(engine.steps for engine in engines),
        sum(engine.preemptions for engine in engines),
        limits.blocks,
    )
    return FleetRun(clock.now, {"any": run})
