"""DistServe's own simulation: what its simulator says of a placement, by its rules and not by vLLM's.

Its rules in short: a prefill instance takes all queued prompts that its cache would hold; a decode instance takes its
queue up to 50,000 tokens; pipelines are rings of stages; requests go to the shortest queue; handing the cache over
takes no time and no memory; the vLLM backend is one instance that prefers prefill and has no chunks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vllm_suite.planner.distserve.capacity import kv_tokens
from vllm_suite.planner.distserve.groups import IntArray
from vllm_suite.planner.distserve.ring import Lives, Ring
from vllm_suite.planner.sources.base import FloatArray
from vllm_suite.planner.sources.linear import distserve

Backend = Literal["distserve", "vllm"]


@dataclass(frozen=True)
class Placement:
    """Instances of prefill and of decode, each cut by tensor (`tp`) and pipeline (`pp`) parallelism.

    For the vLLM backend `decode` is None: one kind of instance does both.
    """

    model: str
    prefill: tuple[int, int]
    decode: tuple[int, int] | None = None
    prefills: int = 1
    decodes: int = 1

    @property
    def gpus(self) -> int:
        """Of all instances."""
        decode = self.decodes * self.decode[0] * self.decode[1] if self.decode else 0
        return self.prefills * self.prefill[0] * self.prefill[1] + decode

    @property
    def name(self) -> str:
        """As ``2,1|1,2``: tp and pp of prefill, tp and pp of decode; ``4,1`` for the vLLM backend."""
        cuts = [self.prefill] + ([self.decode] if self.decode else [])
        return "|".join(f"{tp},{pp}" for tp, pp in cuts)

    @property
    def config(self) -> tuple[int, ...]:
        """As DistServe's search prints it: 1, for segments, before tp and pp of prefill and of decode; or tp, pp."""
        return (1, *self.prefill, *self.decode) if self.decode else self.prefill


@dataclass(frozen=True)
class Workload:
    """Requests in the order of arrival: milliseconds and tokens."""

    arrival: FloatArray
    prompt: IntArray
    output: IntArray


@dataclass(frozen=True)
class Latencies:
    """Of every request, in milliseconds, by DistServe's definitions.

    Attributes:
        ttft: from arrival to the end of its prefill in the last stage.
        tpot: from there to its end, over the tokens of its output; the token that the prefill gave is not one of them.
    """

    ttft: FloatArray
    tpot: FloatArray

    def attainment(self, ttft: float, tpot: float) -> tuple[float, float, float]:
        """Percent of requests that meet the one target, the other, and both."""
        first, later = self.ttft <= ttft, self.tpot <= tpot
        return tuple(100.0 * float(met.mean()) for met in (first, later, first & later))  # type: ignore[return-value]

    def quantile(self, share: float) -> tuple[float, float]:
        """Of TTFT and TPOT, interpolated linearly between order statistics."""
        return float(np.quantile(self.ttft, share)), float(np.quantile(self.tpot, share))


def sample(lengths: Sequence[tuple[int, int]], rate: float, count: int, *, seed: int = 0, cv: float = 1.0) -> Workload:
    """Requests as DistServe's simulator draws them: lengths without replacement, gamma gaps, the first at time 0.

    Args:
        lengths: prompt and output of every request of the data set, in its order.
        rate: requests per second.
        seed: of Python's generator for the lengths and of NumPy's old one for the gaps.
        cv: coefficient of variation of the gaps; 1 is Poisson.
    """
    chosen = random.Random(seed).sample(lengths, count)
    gaps = np.random.RandomState(seed).gamma(1 / cv**2, cv**2 / rate, size=count - 1) * 1000
    table = np.asarray(chosen, dtype=np.int64)
    return Workload(np.concatenate([[0.0], np.cumsum(gaps)]), table[:, 0], table[:, 1])


def simulate(placement: Placement, work: Workload) -> Latencies:
    """Serve the requests to the end.

    Raises:
        SourceError: there are no coefficients for a tensor-parallel size of the placement.
        ValueError: it does not fit, or a request never could run.
    """
    lives = Lives.of(work.prompt, work.output)
    engine: Backend = "distserve" if placement.decode else "vllm"
    heads = _rings(lives, placement.model, placement.prefill, placement.prefills, engine)
    _prefill(heads, work)
    if placement.decode:
        rings = _rings(lives, placement.model, placement.decode, placement.decodes, engine)
        # Nothing of decode acts back on prefill, so one comes after the other; equal times keep the instances' order.
        _decode(rings, sorted((each for ring in heads for each in ring.handed), key=lambda pair: pair[0]))
    prefilled, ended = np.array(lives.prefilled), np.array(lives.ended)
    return Latencies(prefilled - work.arrival, (ended - prefilled) / work.output)


def simulate_prefill(model: str, cut: tuple[int, int], work: Workload) -> Latencies:
    """One prefill instance alone; TPOT is 0. Raises as `simulate`."""
    lives = Lives.of(work.prompt, work.output)
    _prefill(_rings(lives, model, cut, 1, "distserve"), work)
    return Latencies(np.array(lives.prefilled) - work.arrival, np.zeros(len(work.arrival)))


def simulate_decode(model: str, cut: tuple[int, int], work: Workload) -> Latencies:
    """One decode instance alone, to which requests come as they arrive; TTFT is 0. Raises as `simulate`."""
    lives = Lives.of(work.prompt, work.output)
    _decode(
        _rings(lives, model, cut, 1, "distserve"), zip(work.arrival.tolist(), range(len(work.arrival)), strict=True)
    )
    return Latencies(np.zeros(len(work.arrival)), (np.array(lives.ended) - work.arrival) / work.output)


def _prefill(heads: list[Ring], work: Workload) -> None:
    for request, now in enumerate(work.arrival.tolist()):
        _shortest(heads, now, lambda ring: ring.waiting_prefills).prefill(request, now)
    for ring in heads:
        ring.advance()


def _decode(rings: list[Ring], handed: Iterable[tuple[float, int]]) -> None:
    for now, request in handed:
        _shortest(rings, now, lambda ring: ring.waiting_decodes).decode(request, now)
    for ring in rings:
        ring.advance()


def _rings(lives: Lives, model: str, cut: tuple[int, int], count: int, engine: Backend) -> list[Ring]:
    tp, pp = cut
    cost, room = distserve(model, tp, engine=engine).coefficients, kv_tokens(model, tp, pp)
    return [Ring(lives, cost, pp, room, keeps=engine == "vllm") for _ in range(count)]


def _shortest(rings: list[Ring], now: float, waiting: Callable[[Ring], int]) -> Ring:
    for ring in rings:
        ring.advance(now)
    return min(rings, key=waiting)
