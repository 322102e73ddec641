"""What a failed attempt on an instance means for the instance and for the next attempt."""

from __future__ import annotations

from vllm_suite.router.errors import StageTimeout, UpstreamFailure
from vllm_suite.router.job import Job
from vllm_suite.router.members import Member
from vllm_suite.router.membership import Membership
from vllm_suite.router.metrics import RouterMetrics

Failure = UpstreamFailure | StageTimeout


def kind_of(failure: Failure) -> str:
    """The label of a failure; a connection that was never made is `connect`, refused or timed out."""
    return failure.kind if isinstance(failure, UpstreamFailure) else failure.stage


class Blame:
    """Counts failures and tells membership; one per router."""

    def __init__(self, membership: Membership, metrics: RouterMetrics) -> None:
        self._membership = membership
        self._metrics = metrics

    def failed(self, stage: str, member: Member, failure: Failure) -> None:
        """An attempt of `stage` on `member` failed."""
        kind = kind_of(failure)
        self._metrics.count("upstream_errors", stage, kind)
        if isinstance(failure, StageTimeout):
            self._metrics.count("timeouts", failure.stage)
        if kind in ("connect", "disconnect", "engine_dead"):
            self._membership.suspect(member)
        elif kind == "role":
            self._membership.refused(member)

    def for_want_of_items(self, job: Job, member: Member, failure: Failure) -> bool:
        """Whether the instance may have failed for want of encoded items; it gets the media then, and no blame.

        vLLM answers that case with a plain 500. Raises `MediaRefused` where nothing may be encoded locally.
        """
        media = job.media
        if media is None or kind_of(failure) != "status" or not media.give_up(member):
            return False
        self._metrics.recovered("media_sent", "status", member.instance_id, job.rid)
        return True
