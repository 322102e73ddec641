"""The simulated pipeline against vLLM's scheduler with as many batches under way."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from core_loop import drive
from fleets import setting
from replay_engine import EngineSettings, _model
from replay_traces import Row
from replay_workload import Room
from simulated import ExactSource

from vllm_suite.planner.models import Parallel
from vllm_suite.planner.plan import PoolPlan
from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.engine import Engine, Limits
from vllm_suite.planner.simulator.jobs import Job
from vllm_suite.planner.simulator.pool import simulate
from vllm_suite.planner.sources.steps import Steps


class Staged(ExactSource):
    """The last of its stages takes half of each step, the others share the rest."""

    def __init__(self, stages: int) -> None:
        super().__init__(2.0**-7, 2.0**-14, key=2.0**-26)
        self.stages = stages

    def stage_seconds(self, steps: Steps) -> float:
        return self.step_seconds(steps) / 2

    def times(self, steps: Steps) -> list[float]:
        last = self.stage_seconds(steps)
        return [last / (self.stages - 1)] * (self.stages - 1) + [last]


CASES = {
    # blocks, budget, mean gap in units of 1/1024 s
    "chunks": (2000, 128, 75),
    "many": (2000, 512, 25),
    "cache": (110, 512, 30),
    "cache and chunks": (100, 64, 80),
    "idle": (2000, 8192, 1500),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("stages", "ahead", "known"), [(2, False, False), (2, True, False), (3, False, False), (3, True, True)]
)
def test_batches_under_way(case: str, stages: int, ahead: bool, known: bool) -> None:
    blocks, budget, gap = CASES[case]
    draw, at, rows = random.Random(case), 0.0, []
    for _ in range(20 if case == "idle" else 40):
        at += draw.randrange(2 * gap) / 1024
        rows.append(Row(at, draw.randrange(1, 900), draw.choice([1, 2, *(draw.randrange(1, 300) for _ in range(4))])))
    source, caching = Staged(stages), case.startswith("cache")
    served = drive(
        rows,
        EngineSettings(room=Room(blocks=blocks, seqs=16), batched_tokens=budget, ahead=ahead, prefix_caching=caching),
        source.times,
        places=stages + ahead,
        stagger=stages if ahead else 1,
        known=known,
    )
    jobs = [Job(index, row.arrival_s or 0.0, row.prompt, row.output) for index, row in enumerate(rows)]
    limits = Limits(blocks - 1, 16, 16, budget, async_scheduling=ahead, by_length=known, prefix_caching=caching)
    (engine,) = simulate(jobs, source, limits, lambda job, now: None).engines
    assert [(job.first_token, job.last_token) for job in jobs] == [(each[0], each[-1]) for each in served.times]
    gaps = [max((later - earlier for earlier, later in pairwise(each)), default=0.0) for each in served.times]
    assert [job.longest_gap for job in jobs] == gaps
    assert (engine.steps, engine.preemptions, engine.free) == (served.steps, served.preemptions, blocks - 1)
    assert (engine.preemptions > 0) == caching


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("triton", [False, True])
def test_vllm_has_as_many_batches_under_way(stages: int, triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.config.vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms.cpu import CpuPlatform

    # What vLLM makes of its defaults on a GPU: the second model runner where there is Triton.
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    monkeypatch.setattr(vllm.config.vllm, "HAS_TRITON", triton)
    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(lambda cls, config: None))
    config = EngineArgs(
        model=str(_model()),
        skip_tokenizer_init=True,
        dtype="float32",
        load_format="dummy",
        max_model_len=4096,
        pipeline_parallel_size=stages,
        distributed_executor_backend="mp",
    ).create_engine_config()
    pool = PoolPlan("any", 1, Parallel(pp=stages), kv_blocks=100)
    limits = setting(second_runner=triton, async_scheduling=True).limits(pool)
    assert limits.async_scheduling == config.scheduler_config.async_scheduling
    source = ExactSource()
    source.stages = stages
    engine = Engine(Clock(), source, limits, lambda job, now: None)
    places = engine._pipeline.places if engine._pipeline else 1 + limits.async_scheduling
    assert places == config.max_concurrent_batches
