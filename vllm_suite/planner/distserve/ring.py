"""One instance of DistServe's simulator: a ring of pipeline stages, each with a prefill and a decode queue.

The rules are those of `simdistserve` (LLMServe/DistServe, commit 82831f1), written anew. Steps in which one batch
decodes alone are taken together, so a run costs by requests more than by tokens. Milliseconds, as its coefficients.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_suite.planner.distserve.groups import Group, IntArray, take
from vllm_suite.planner.sources.linear import Coefficients
from vllm_suite.planner.sources.steps import DecodeLine

TOKEN_BUDGET = 50_000
"""Keys of one decode batch, the new tokens included: a constant in DistServe's simulator, whatever the memory holds."""
OVERHEAD_MS, OVERHEAD_PER_TOKEN_MS = 2.0, 1e-4
"""Of every batch in the first stage, called Ray's overhead there."""
STAGE_MS = 1.0
"""Added to every stage of a prefill for each stage of the pipeline."""
BACK_PRESSURE = 9_000_000
"""Keys waiting to be decoded above which a worker starts no prefill."""


@dataclass
class Lives:
    """Of every request its lengths in tokens, and as found out its first token and its end in milliseconds."""

    prompt: IntArray
    output: IntArray
    prefilled: list[float]
    ended: list[float]

    @classmethod
    def of(cls, prompt: IntArray, output: IntArray) -> Lives:
        """None has begun."""
        return cls(prompt, output, [math.nan] * len(prompt), [math.nan] * len(prompt))

    def group(self, ids: Sequence[int]) -> Group:
        """Requests that are about to decode their first token after the prompt's."""
        chosen = np.asarray(ids, dtype=np.int64)
        return Group(chosen, self.output[chosen], self.prompt[chosen])


@dataclass(frozen=True)
class _Prompts:
    ids: tuple[int, ...]
    tokens: int
    squares: int


class Ring:
    """Stages that hand batches on; the last hands decode batches to the first.

    Attributes:
        keeps: requests decode where they were prefilled (the vLLM backend). If not, `handed` collects them.
        handed: end of the prefill and number of requests that go elsewhere.
    """

    def __init__(self, lives: Lives, coefficients: Coefficients, stages: int, capacity: int, *, keeps: bool) -> None:
        self.lives, self.keeps = lives, keeps
        self._cost, self._stages, self._capacity = coefficients, stages, capacity
        self.handed: list[tuple[float, int]] = []
        self._arrived: deque[int] = deque()
        self._prompts: list[deque[_Prompts]] = [deque() for _ in range(stages)]
        self._decodes: list[deque[Group]] = [deque() for _ in range(stages)]
        self._running: list[_Prompts | Group | None] = [None] * stages
        self._ends = [math.inf] * stages

    @property
    def waiting_prefills(self) -> int:
        """What the dispatcher looks at: requests queued at the first stage, and those it prefills."""
        running = self._running[0]
        return len(self._arrived) + (len(running.ids) if isinstance(running, _Prompts) else 0)

    @property
    def waiting_decodes(self) -> int:
        """The same of decode: only those queued; a running batch is not counted."""
        return sum(group.size for group in self._decodes[0])

    def prefill(self, request: int, now: float) -> None:
        """A request arrives."""
        self._arrived.append(request)
        self._wake(now)

    def decode(self, request: int, now: float) -> None:
        """A request arrives that was prefilled elsewhere."""
        self._decodes[0].append(self.lives.group([request]))
        self._wake(now)

    def advance(self, until: float = math.inf) -> None:
        """Let everything happen that happens before `until`; nothing may arrive before that time."""
        ends = self._ends
        while (now := min(ends)) < until:
            stage = ends.index(now)
            self._finish(stage, now)
            self._start(stage, now, until)
            behind = (stage + 1) % self._stages
            if ends[behind] == math.inf:
                self._start(behind, now, until)

    def _wake(self, now: float) -> None:
        if self._ends[0] == math.inf:
            self._ends[0] = now

    def _finish(self, stage: int, now: float) -> None:
        work, self._running[stage], self._ends[stage] = self._running[stage], None, math.inf
        last, behind = stage == self._stages - 1, (stage + 1) % self._stages
        if isinstance(work, _Prompts):
            if not last:
                self._prompts[behind].append(work)
                return
            for request in work.ids:
                self.lives.prefilled[request] = now
            if self.keeps:
                self._decodes[0].append(self.lives.group(work.ids))
            else:
                self.handed.extend((now, request) for request in work.ids)
        elif work is not None:
            if last:
                work.age(1)
                for request in work.take_ended().tolist():
                    self.lives.ended[request] = now
            if work.size:
                self._decodes[behind].append(work)

    def _start(self, stage: int, now: float, until: float) -> None:
        work: _Prompts | Group | None = None
        if (self._prompts[stage] or (stage == 0 and self._arrived)) and not self._pressed(stage):
            work = self._prompts[stage].popleft() if stage else self._batch()
            duration = self._prefill_ms(work)
        elif self._decodes[stage]:
            work = take(self._decodes[stage], self._capacity, TOKEN_BUDGET)
            if work is None:
                raise ValueError(f"a request of more than {TOKEN_BUDGET} tokens never decodes by DistServe's rules")
            if stage == 0:
                now += self._alone(work, until - now)
            duration = self._decode_ms(work)
        if work is None:
            return
        if stage == 0:
            tokens = work.tokens if isinstance(work, _Prompts) else work.context
            duration += OVERHEAD_MS + OVERHEAD_PER_TOKEN_MS * tokens
        self._running[stage], self._ends[stage] = work, now + duration

    def _pressed(self, stage: int) -> bool:
        return sum(group.context for group in self._decodes[stage]) > BACK_PRESSURE

    def _batch(self) -> _Prompts:
        """All that have arrived, as far as the cache would hold them."""
        room, tokens, squares, ids = self._capacity, 0, 0, []
        while self._arrived:
            length = int(self.lives.prompt[self._arrived[0]])
            if length > room:
                break
            room, tokens, squares = room - length, tokens + length, squares + length**2
            ids.append(self._arrived.popleft())
        if not ids:
            raise ValueError(f"a prompt of {length} tokens does not fit in a cache of {self._capacity}")
        return _Prompts(tuple(ids), tokens, squares)

    def _prefill_ms(self, work: _Prompts) -> float:
        constant, linear, square = self._cost.prefill
        whole = constant + linear * work.tokens + square * work.squares
        return whole / self._stages + STAGE_MS * self._stages

    def _decode_set(self, size: int) -> tuple[float, float, float]:
        return self._cost.decode_small if size < self._cost.threshold else self._cost.decode_large

    def _decode_ms(self, work: Group) -> float:
        constant, per_key, per_sequence = self._decode_set(work.size)
        return (constant + per_key * work.keys + per_sequence * work.size) / self._stages

    def _alone(self, work: Group, time: float) -> float:
        """Take the whole rounds of a batch that is the only work, within a time and until one of its requests ends.

        Prompts that wait behind it do so because it presses back on them, and its keys only grow.
        """
        most = min(work.before_the_last, (TOKEN_BUDGET - work.keys) // work.size)
        if most < 1 or any(map(math.isfinite, self._ends)) or any(self._decodes) or any(self._prompts):
            return 0.0
        _, per_key, _ = self._decode_set(work.size)
        first = self._decode_ms(work) * self._stages + OVERHEAD_MS + OVERHEAD_PER_TOKEN_MS * work.context
        line = DecodeLine(first, (per_key + OVERHEAD_PER_TOKEN_MS) * work.size)
        rounds = most if line.total(most) <= time else line.within(time)
        work.age(rounds)
        return line.total(rounds)
