"""Where the time of each request went, and whether it kept the targets.

A request is looked at once, when it has ended: nothing is done for each token.
"""

from __future__ import annotations

from vllm_suite.metrics.router import VERDICT
from vllm_suite.router.job import Job
from vllm_suite.router.lengths import SEVERAL, measure
from vllm_suite.router.members import Pool
from vllm_suite.router.metrics import RouterMetrics
from vllm_suite.router.targets import Targets

_OTHER = "other"


class Times:
    """One per router."""

    def __init__(self, targets: Targets, pool: Pool, metrics: RouterMetrics) -> None:
        slo = targets.slo
        self._ttft_s = None if slo.ttft is None else slo.ttft / 1000
        self._tpot_s = None if slo.tpot is None else slo.tpot / 1000
        self._counts = slo.ttft is not None or slo.tpot is not None
        self._models: set[str] = set()
        self._pool = pool
        self._metrics = metrics

    def failed(self) -> None:
        """A request was refused for want of room, or ended in a defect of the router."""
        self._judged(_OTHER, "failed")

    def ended(self, job: Job, status: int) -> None:
        """A request was answered. What the client did wrong itself (4xx) says nothing of the fleet."""
        answer, metrics = job.answer, self._metrics
        if status >= 500 or status == 429 or (status == 200 and (answer is None or not answer.ended)):
            self._judged(self._model(job), "failed")
            return
        if status != 200 or answer is None:
            return
        laps, model = job.laps, self._model(job)
        streamed = not answer.whole and answer.first.startswith(b"data: ")
        if not streamed:
            laps["answer"] = laps.pop("first_token", 0.0) + laps.pop("decode", 0.0)
        for stage, seconds in laps.items():
            metrics.observe(seconds, "stage_seconds", job.path, stage)
        tokens = 0 if job.prompt.whole_reason in SEVERAL else measure(answer)[0]
        ttft = tpot = None
        if streamed:
            tail = laps.get("decode", 0.0)
            ttft = sum(laps.values()) - tail
            metrics.observe(ttft, "ttft_seconds", model)
            if tokens > 1:
                tpot = tail / (tokens - 1)
                metrics.observe(tpot, "tpot_seconds", model)
        if self._counts:
            verdict = self._whole(sum(laps.values()), tokens) if ttft is None else self._streamed(ttft, tpot, tokens)
            self._judged(model, verdict)

    def _judged(self, model: str, verdict: str) -> None:
        if not self._counts:
            return
        if model not in self._models:
            # All of them from now on: where no request is good, the share of good ones is 0 and has to be seen.
            self._models.add(model)
            for one in VERDICT.values:
                self._metrics.add(0, "slo_requests", model, one)
        self._metrics.count("slo_requests", model, verdict)

    def _streamed(self, ttft: float, tpot: float | None, tokens: int) -> str:
        if self._ttft_s is not None and ttft > self._ttft_s:
            return "late"
        if self._tpot_s is None or tokens == 1:
            return "good"
        if tpot is None:
            return "unknown"
        return "slow" if tpot > self._tpot_s else "good"

    def _whole(self, seconds: float, tokens: int) -> str:
        """One that was not streamed: its last token is due when it would have been in a stream that just keeps both."""
        if self._ttft_s is None or self._tpot_s is None or not tokens:
            return "unknown"
        return "late" if seconds > self._ttft_s + self._tpot_s * (tokens - 1) else "good"

    def _model(self, job: Job) -> str:
        """The model's name as a label: one that some member serves, since clients may ask for any."""
        name = job.prompt.model
        for member in self._pool.members:
            if name in member.state.models:
                return str(name)
            if name is None and member.state.models:
                return member.state.models[0]
        return _OTHER
