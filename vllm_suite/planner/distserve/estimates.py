"""Estimates for the placement algorithms by DistServe's rules: what one instance, or a pair, serves of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_suite.planner.distserve.capacity import kv_tokens
from vllm_suite.planner.distserve.goodput import Run, goodput, run_of
from vllm_suite.planner.distserve.parity import Placement, simulate, simulate_decode, simulate_prefill
from vllm_suite.planner.models import Parallel
from vllm_suite.planner.plan import Slo
from vllm_suite.planner.sources.base import SourceError
from vllm_suite.planner.sources.linear import distserve


@dataclass(frozen=True)
class Estimates:
    """Of one of DistServe's models.

    Attributes:
        lengths: prompt and output of every request of the data set.
        slo: in seconds; of an instance alone only its own target counts, for the same share of requests.
        highest, resolution: of the search, requests per second and GPU.
        decide: requests counted in a long run.
    """

    model: str
    lengths: Sequence[tuple[int, int]]
    slo: Slo
    highest: float = 16.0
    resolution: float = 1 / 32
    decide: int = 6000

    def fits(self, cut: Parallel) -> bool:
        """Whether there are coefficients and a measured capacity."""
        try:
            distserve(self.model, cut.tp)
            kv_tokens(self.model, cut.tp, cut.pp)
        except (SourceError, ValueError):
            return False
        return True

    def prefill(self, cut: Parallel) -> float:
        """Requests per second that one prefill instance serves within the target of TTFT."""
        return self._rate(run_of(self.lengths, lambda work: simulate_prefill(self.model, _sizes(cut), work)), cut.gpus)

    def decode(self, cut: Parallel) -> float:
        """The same of one decode instance and TPOT; requests come to it as they arrive."""
        return self._rate(run_of(self.lengths, lambda work: simulate_decode(self.model, _sizes(cut), work)), cut.gpus)

    def pair(self, prefill: Parallel, decode: Parallel) -> float:
        """The same of both together and both targets."""
        placement = Placement(self.model, _sizes(prefill), _sizes(decode))
        return self._rate(run_of(self.lengths, lambda work: simulate(placement, work)), placement.gpus)

    def _rate(self, run: Run, gpus: int) -> float:
        return goodput(run, self.slo, self.highest * gpus, self.resolution * gpus, decide=self.decide).rate


def _sizes(cut: Parallel) -> tuple[int, int]:
    return cut.tp, cut.pp
