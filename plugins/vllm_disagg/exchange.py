"""What the scheduler half and the worker halves tell each other in a step, beside vLLM's own metadata."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_disagg.leases import End
from vllm_suite.compat.nixl import KVConnectorWorkerMetadata


@dataclass(slots=True)
class PullPlan:
    """One pull of this step: from whom, and how many seconds it may take."""

    peer: str
    budget_s: float


@dataclass(slots=True)
class StepOrders:
    """Scheduler to workers.

    Attributes:
        pulls: plans by request id, for each entry of ``reqs_to_recv``.
        fail: requests whose reference was refused while the failure policy is "fail".
        let_go: leases that ended without a pull, by the producer's request id.
    """

    pulls: dict[str, PullPlan] = field(default_factory=dict)
    fail: list[str] = field(default_factory=list)
    let_go: dict[str, End] = field(default_factory=dict)


@dataclass(slots=True)
class PullReport:
    """How one rank's part of a pull ended.

    Attributes:
        failure: why it failed, or "".
        blocks: blocks of the request on this rank; every rank holds its heads of the same blocks.
    """

    peer: str
    failure: str
    size: int
    blocks: int
    seconds: float

    def merge(self, other: PullReport) -> PullReport:
        """The same pull on two ranks: it failed if either did, and took as long as the slower."""
        return PullReport(
            peer=self.peer,
            failure=self.failure or other.failure,
            size=self.size + other.size,
            blocks=max(self.blocks, other.blocks),
            seconds=max(self.seconds, other.seconds),
        )


class WorkerReports(KVConnectorWorkerMetadata):
    """Workers to scheduler: the pulls that ended in this step, by request id."""

    def __init__(self, pulls: dict[str, PullReport]) -> None:
        self.pulls = pulls

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReports:
        assert isinstance(other, WorkerReports)
        merge_reports(self.pulls, other.pulls)
        return self


def merge_reports(into: dict[str, PullReport], more: dict[str, PullReport]) -> None:
    """Add the reports of further ranks to those in ``into``."""
    for request_id, report in more.items():
        before = into.get(request_id)
        into[request_id] = report if before is None else before.merge(report)
