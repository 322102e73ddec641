"""The traffic of a fleet, from what its instances counted between looks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields

from vllm_suite.roles.seen import Seen, Work


@dataclass(frozen=True)
class Traffic:
    """What comes now.

    Attributes:
        rate: requests per second.
        prompt, output: mean tokens of a request.
        waiting, running: requests on all instances at the last look.
    """

    rate: float
    prompt: float
    output: float
    waiting: int
    running: int

    def demand(self, seconds: float) -> float:
        """Requests per second that have to be served so that nothing of what waits is left after that time."""
        return self.rate + self.waiting / seconds


@dataclass
class _Sums:
    asked: float = 0.0
    prefilled: float = 0.0
    prefill_finished: float = 0.0
    prefill_tokens: float = 0.0
    decode_finished: float = 0.0
    decode_prompts: float = 0.0
    output_tokens: float = 0.0
    generated: float = 0.0


class Observer:
    """Takes looks; what lies further back than `window` seconds is forgotten."""

    def __init__(self, window: float) -> None:
        self._window = window
        self._before: dict[str, Seen] = {}
        self._at: float | None = None
        self._steps: deque[tuple[float, float, _Sums]] = deque()
        self._waiting = self._running = self._decoding = 0

    def see(self, fleet: Sequence[Seen], now: float) -> None:
        """One look."""
        if self._at is not None and now > self._at:
            step = _Sums()
            for one in fleet:
                before = self._before.get(one.instance_id)
                # What an instance did in two roles, or in two lives, cannot be told apart.
                if before is not None and (before.epoch, before.role_epoch) == (one.epoch, one.role_epoch):
                    _add(step, one, before.work, one.work)
            self._steps.append((now, now - self._at, step))
        self._before = {one.instance_id: one for one in fleet}
        self._at = now
        self._waiting = sum(one.queue for one in fleet)
        self._running = sum(one.running for one in fleet)
        self._decoding = sum(one.running for one in fleet if one.role in ("decode", "any"))
        while self._steps and self._steps[0][0] <= now - self._window:
            self._steps.popleft()

    def traffic(self) -> Traffic | None:
        """Over the window; None where nothing came, or nothing was finished whose length would be known."""
        seconds = sum(took for _, took, _ in self._steps)
        total = _Sums()
        for _, _, step in self._steps:
            for field in fields(_Sums):
                setattr(total, field.name, getattr(total, field.name) + getattr(step, field.name))
        # All requests are asked to decode in the end; where prefill is what holds them up, more have come than that.
        came = max(total.asked, total.prefilled)
        prompts = total.prefill_finished or total.decode_finished
        if not seconds or not came or not prompts:
            return None
        tokens = total.prefill_tokens if total.prefill_finished else total.decode_prompts
        # Long answers end late: what the unfinished ones have got so far already says that they are long.
        so_far = total.generated / max(1.0, total.decode_finished + self._decoding)
        finished = total.output_tokens / total.decode_finished if total.decode_finished else 1.0
        return Traffic(came / seconds, tokens / prompts, max(finished, so_far, 1.0), self._waiting, self._running)


def _add(step: _Sums, one: Seen, before: Work | None, now: Work | None) -> None:
    if before is None or now is None:
        return
    came = {stage: count - before.arrived.get(stage, 0) for stage, count in now.arrived.items()}
    step.prefilled += max(0, came.get("prefill", 0))
    step.asked += max(0, came.get("decode", 0) + came.get("unknown", 0))
    finished, prompts = now.finished - before.finished, now.prompt_tokens - before.prompt_tokens
    if min(finished, prompts) < 0:
        return
    if one.role == "prefill":
        step.prefill_finished += finished
        step.prefill_tokens += prompts
    elif one.role in ("decode", "any"):
        step.decode_finished += finished
        step.decode_prompts += prompts
        step.output_tokens += max(0, now.output_tokens - before.output_tokens)
        step.generated += max(0, now.generated - before.generated)
