"""One question to the planner, and the simulations that answer it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from vllm_suite.planner.evaluate import evaluate
from vllm_suite.planner.hardware import Cluster
from vllm_suite.planner.models import Model, Quantization
from vllm_suite.planner.outcome import Outcome
from vllm_suite.planner.plan import Plan, PoolPlan, Role, Slo
from vllm_suite.planner.search.bounds import Bounds
from vllm_suite.planner.search.choices import Choices
from vllm_suite.planner.search.horizon import Horizon
from vllm_suite.planner.search.objective import Goal, Objective
from vllm_suite.planner.search.simulated import Simulated, part, parts
from vllm_suite.planner.search.sources import Sources
from vllm_suite.planner.search.space import Space
from vllm_suite.planner.search.state import digest
from vllm_suite.planner.simulator.setting import Setting
from vllm_suite.planner.sources.base import LatencySource
from vllm_suite.planner.traces import Workload
from vllm_suite.planner.traces.rows import BLOCK, Row
from vllm_suite.planner.workload import Request

SAMPLE = 2000
"""Requests that bounds and the longest request are taken from."""


@dataclass(frozen=True)
class What:
    """One simulation that differs from the question in something.

    Attributes:
        plan, rate: what is simulated.
        scale: of every time of the source.
        prompt, output: factors of the lengths; items stay as they are.
        faster: a role whose engines take a fifth less time.
        energy: also joules.
    """

    plan: Plan
    rate: float
    scale: float = 1.0
    prompt: float = 1.0
    output: float = 1.0
    faster: Role | None = None
    energy: bool = False


@dataclass(frozen=True)
class Case:
    """A question.

    Attributes:
        name: of the model, as it was asked for.
        rate: requests per second that are asked for or were recorded; None where nobody said.
        asked: whether `rate` is a demand of its own.
        requests: of a simulation at least.
        source: as it was asked for.
    """

    name: str
    model: Model
    quant: Quantization
    cluster: Cluster
    workload: Workload
    slo: Slo
    goal: Goal
    rate: float | None
    sources: Sources
    setting: Setting
    choices: Choices
    asked: bool = False
    requests: int = SAMPLE
    seed: int = 0
    source: str = "roofline"
    longest: int | None = None
    dler: bool = False

    def sample(self) -> list[Request]:
        """The first requests."""
        count = SAMPLE if self.workload.count is None else min(SAMPLE, self.workload.count)
        return list(self.workload.requests(self.rate or 1.0, count, self.seed))

    def lengths(self) -> tuple[int, int]:
        """Tokens of the longest prompt, and of the longest prompt with its output, of all requests up to 100,000."""
        rows = list(islice(self.workload.rows(self.seed), 100_000 if self.workload.count else SAMPLE))
        prompt, both = max(row.prompt for row in rows), max(row.prompt + row.output for row in rows)
        return prompt, max(both, self.longest or 0)

    def horizon(self, sample: list[Request]) -> Horizon:
        """How long simulations are."""
        decoded = sum(each.output - 1 for each in sample) / len(sample)
        return Horizon.of(self.slo, decoded, 1.0, self.requests)

    def objective(self) -> Objective:
        """What is sought."""
        return Objective(self.goal, self.cluster, self.rate, self.workload.mean_output)

    def bounds(self, sample: list[Request]) -> Bounds:
        """Of plans."""
        return Bounds(self.setting, sample, self.slo, self.horizon(sample))

    def evaluate(self, sample: list[Request]) -> Simulated:
        """What the search asks."""
        return Simulated(
            self.setting, self.workload, self.slo, self.horizon(sample), self.seed, energy=self.goal == "energy"
        )

    def varied(self, what: What, sample: list[Request]) -> tuple[Setting, Workload, Simulated]:
        """Setting, workload and evaluation of one that differs."""
        sources = self.sources if what.scale == 1 else self.sources.scaled(what.scale)
        source: Callable[[PoolPlan], LatencySource] = sources
        if what.faster is not None:
            quick = sources.scaled(0.8)
            source = lambda pool: (quick if pool.role == what.faster else sources)(pool)  # noqa: E731
        encode = self.setting.encode_seconds and sources.encode
        setting = replace(self.setting, source=source, encode_seconds=encode)
        if what.faster == "encode" and encode is not None:
            setting = replace(setting, encode_seconds=sources.scaled(0.8).encode)
        workload = stretched(self.workload, what.prompt, what.output)
        return setting, workload, Simulated(setting, workload, self.slo, self.horizon(sample), self.seed)

    def outcome(self, what: What, sample: list[Request]) -> Outcome:
        """All figures of one simulation, of a large fleet of equal parts from one of them.

        Raises:
            SimulationError, PlanError: the plan cannot serve the workload.
        """
        setting, workload, simulated = self.varied(what, sample)
        plan, rate = part(what.plan, what.rate)
        found = evaluate(
            plan,
            setting,
            lambda: simulated.requests(rate),
            self.slo,
            rate=rate,
            stationary=not workload.recorded,
            energy=what.energy,
        )
        return of_all(found, parts(what.plan))

    def key(self, space: Space) -> str:
        """Of all that the results of a search depend on."""
        return digest((
            self.name, self.model, self.quant, self.cluster, self.workload.fingerprint, self.workload.cv, self.slo,
            self.goal, self.rate, self.choices, self.requests, self.seed, self.source, self.longest, self.dler,
            space.kinds,
            # A file that was measured again is another question.
            *(() if self.setting.measured is None else (self.setting.measured,)),
        ))  # fmt: skip


def of_all(outcome: Outcome, times: int) -> Outcome:
    """The figures of a fleet of so many equal parts, from those of one; `requests` and `counted` are of that one."""
    if times == 1:
        return outcome
    pools = {
        role: replace(load, preemptions=times * load.preemptions, transfer_seconds=times * load.transfer_seconds)
        for role, load in outcome.pools.items()
    }
    return replace(outcome, rate=times * outcome.rate, tokens_per_s=times * outcome.tokens_per_s,
                   gpus=times * outcome.gpus, pools=pools)  # fmt: skip


def stretched(workload: Workload, prompt: float, output: float) -> Workload:
    """The same requests with longer or shorter prompts and outputs, at least one token of each; items stay."""
    if prompt == 1 and output == 1:
        return workload
    extra = sum(item.tokens for item in workload.items)

    def rows(seed: int) -> Iterator[Row]:
        for row in workload.rows(seed):
            text = max(1, round((row.prompt - extra) * prompt))
            prefix = row.prefix[: (text + extra) // BLOCK]
            yield row._replace(prompt=text + extra, output=max(1, round(row.output * output)), prefix=prefix)

    return replace(
        workload,
        rows=rows,
        mean_prompt=(workload.mean_prompt - extra) * prompt + extra,
        mean_output=workload.mean_output * output,
    )
