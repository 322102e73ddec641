"""DistServe's search as its simulator does it: every placement of one prefill and one decode instance, by bisection.

Both of its modes search pairs; the paper's algorithms are in `placement`. A placement passes at a rate if the 90th
percentile of TTFT and that of TPOT are below their targets, each by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vllm_suite.planner.distserve.capacity import LAYERS_AND_HEADS, kv_tokens
from vllm_suite.planner.distserve.parity import Latencies, Placement, sample, simulate
from vllm_suite.planner.sources.base import SourceError
from vllm_suite.planner.sources.linear import distserve


@dataclass(frozen=True)
class Question:
    """What is searched for.

    Attributes:
        ttft, tpot: targets in milliseconds.
        count: requests of each simulation.
        most: largest rate per GPU, requests per second.
        resolution: the bisection ends when its interval is no wider.
        share: that has to meet each target.
    """

    ttft: float
    tpot: float
    count: int = 300
    most: float = 5.0
    resolution: float = 0.25
    share: float = 0.9
    seed: int = 0

    def passes(self, found: Latencies) -> bool:
        """Whether both percentiles are below their targets."""
        ttft, tpot = found.quantile(self.share)
        return ttft < self.ttft and tpot < self.tpot


@dataclass(frozen=True)
class Found:
    """Rates per GPU by placement, in the order of the search, and the placement it names."""

    rates: Mapping[Placement, float]
    runs: int
    best: Placement = field(init=False)

    def __post_init__(self) -> None:
        # Of equal rates fewer GPUs, of these the first.
        best = min(self.rates, key=lambda each: (-self.rates[each], each.gpus))
        object.__setattr__(self, "best", best)

    def ranking(self) -> list[tuple[float, list[Placement]]]:
        """Rates from the largest on, each with the placements that have it."""
        return [
            (rate, [p for p in self.rates if self.rates[p] == rate]) for rate in sorted(set(self.rates.values()))[::-1]
        ]


def pairs(model: str, nodes: int, gpus_per_node: int, *, high_affinity: bool = False) -> Iterator[Placement]:
    """Pairs of one prefill and one decode instance that it would simulate, where it has coefficients and capacities.

    With low affinity a segment of both pipelines fits in a node, and pipelines may go over several nodes. High affinity
    drops that bound; it stays a search of pairs.
    """
    layers, heads = LAYERS_AND_HEADS[model]
    gpus = nodes * gpus_per_node
    room = gpus if high_affinity else gpus_per_node
    over = [1] if high_affinity else _divisors(layers, nodes)
    cuts = [(tp, pp) for tp in _divisors(heads, room) for pp in _divisors(layers, room)]
    for segments in over:
        for prefill in cuts:
            for decode in cuts:
                node = prefill[0] * prefill[1] + decode[0] * decode[1]
                if (not high_affinity and node > gpus_per_node) or segments * node > gpus:
                    continue
                found = Placement(model, (prefill[0], segments * prefill[1]), (decode[0], segments * decode[1]))
                if _known(model, found.prefill) and found.decode and _known(model, found.decode):
                    yield found


def colocated(model: str, gpus: int) -> Iterator[Placement]:
    """Instances of the vLLM backend that it would simulate."""
    layers, heads = LAYERS_AND_HEADS[model]
    for tp in _divisors(heads, gpus):
        for pp in _divisors(layers, gpus // tp):
            if _known(model, (tp, pp), vllm=True):
                yield Placement(model, (tp, pp))


def best_rate(placement: Placement, lengths: Sequence[tuple[int, int]], question: Question) -> tuple[float, int]:
    """The largest rate per GPU that was seen to pass, 0 for none; and the simulations it took."""
    low, high, runs = 0.0, question.most, 0
    while high - low > question.resolution:
        rate = (low + high) / 2
        work = sample(lengths, rate * placement.gpus, question.count, seed=question.seed)
        runs += 1
        if question.passes(simulate(placement, work)):
            low = rate
        else:
            high = rate
    return low, runs


def search(placements: Iterator[Placement], lengths: Sequence[tuple[int, int]], question: Question) -> Found:
    """The best rate of each placement."""
    rates, runs = {}, 0
    for placement in placements:
        rates[placement], more = best_rate(placement, lengths, question)
        runs += more
    return Found(rates, runs)


def _divisors(number: int, most: int) -> list[int]:
    return [each for each in range(1, most + 1) if number % each == 0]


def _known(model: str, cut: tuple[int, int], *, vllm: bool = False) -> bool:
    try:
        distserve(model, cut[0], engine="vllm" if vllm else "distserve")
        kv_tokens(model, *cut)
    except (SourceError, ValueError):
        return False
    return True
