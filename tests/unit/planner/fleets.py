"""For tests of simulated fleets: settings with known step times, and an observer that checks every engine's blocks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from simulated import ExactSource

from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import load
from vllm_suite.planner.plan import Plan, PoolPlan, Role
from vllm_suite.planner.simulator.engine import Engine
from vllm_suite.planner.simulator.fleet import FleetRun, simulate_plan
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.simulator.setting import Serving, Setting
from vllm_suite.planner.sources.base import LatencySource
from vllm_suite.planner.sources.steps import DecodeLine, Steps
from vllm_suite.planner.sources.transfers import Transfers
from vllm_suite.planner.workload import Item, Request

MODEL, QUANT = load("meta-llama/Llama-3.1-8B")
CLUSTER = cluster("8xH100-SXM")
# A second a step and an eighth for each token of a prompt.
SOURCE = ExactSource(1.0, 0.125)
ALL_DISAGGREGATED = Serving(min_prompt_tokens=0)


def setting(source: LatencySource = SOURCE, serving: Serving = ALL_DISAGGREGATED, **more: Any) -> Setting:
    """A setting in which a step takes what `source` says on any pool. Without prefix caching, and with scheduling that
    does not run ahead, where `more` says nothing else.
    """
    plain = Setting(MODEL, QUANT, CLUSTER, lambda pool: source, serving=serving)
    return replace(plain, **{"prefix_caching": False, "async_scheduling": False, **more})


def plan(**pools: dict[str, Any]) -> Plan:
    """``plan(prefill={"count": 2}, decode={})``; caches are large enough where nothing else is said."""
    roles: dict[str, Role] = {"encode": "encode", "prefill": "prefill", "decode": "decode", "any": "any"}
    return Plan(tuple(PoolPlan(roles[role], **{"count": 1, "kv_blocks": 1000, **has}) for role, has in pools.items()))


def pull_seconds(blocks: int) -> float:
    """Of so many blocks between two engines of one accelerator each in a node."""
    one = PoolPlan("any", 1).parallel
    return Transfers(CLUSTER).kv(MODEL, QUANT, blocks * 16, source=one, target=one, source_rank=0, target_rank=1)


class Watch:
    """An observer: blocks are never short, and time goes on."""

    def __init__(self) -> None:
        self.engines: dict[int, Engine] = {}
        self.last = 0.0

    def __call__(
        self, engine: Engine, start: float, end: float, count: int, steps: Steps, line: DecodeLine | None
    ) -> None:
        self.engines[engine.number] = engine
        assert engine.free >= 0
        assert engine.kept >= 0
        # Blocks that jobs share are kept for each of them.
        assert engine.free + (engine.kept if engine.cache is None else 0) <= engine.limits.blocks
        assert start <= end
        assert self.last <= end
        self.last = end

    def empty(self) -> bool:
        """Whether every engine has all its blocks back."""
        return all(engine.free == engine.limits.blocks and not engine.kept for engine in self.engines.values())


def serve(of: Plan, given: Setting, requests: list[Request], **more: Any) -> tuple[list[Served], FleetRun]:
    """All requests in order of their numbers, and the run."""
    found: list[Served] = []
    run = simulate_plan(of, given, requests, found.append, **more)
    return sorted(found, key=lambda served: served.number), run


def poisson(
    count: int, rate: float, prompt: int, output: int, seed: int = 0, items: tuple[Item, ...] = ()
) -> Iterator[Request]:
    """Requests at random times."""
    draw, now = random.Random(seed), 0.0
    for number in range(count):
        now += draw.expovariate(rate)
        yield Request(number, now, prompt, output, items=items)
