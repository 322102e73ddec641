"""The length-aware order of the `vllm_dler` plugin, for simulated engines.

``key = arrival + offset(S)``, the smallest first, with ``S`` the expected output and the prompt at a weight; see
docs/length-aware-scheduling.md. Lengths are learned online from the jobs that end, by label and length of the prompt. A
key is fixed when a job arrives and falls as more is learned. An admission leaves headroom for those that run. Where
blocks run out, the one with most tokens to come for each to be computed again gives way. The plugin's groups, caps and
gate are not simulated, nor is a kappa that adapts.
"""

from __future__ import annotations

import math
from collections import deque
from heapq import heapify, heappop, heappush
from typing import Literal

from vllm_suite.lengths import OnlineLengths
from vllm_suite.planner.simulator.jobs import Job, SimulationError

# The plugin's defaults: finished jobs, or seconds, after which waiting ones are looked at anew; and waiting ones that
# are looked at for each that ended.
_RELEARN_EVERY, _RELEARN_S, _SHARE = 32, 1.0, 4
# The boost: jobs that its scales look back on, how often, which share of latencies, its shape.
_WINDOW, _EVERY, _QUANTILE = 256, 16, 0.95
_STEEPNESS, _MOST = 0.5, 2.0
# Tokens of headroom for a running job of which nothing is known.
_UNKNOWN_ROOM = 16
# Generated tokens after which a running job's standing is looked at anew.
_STEP = 16


class LengthOrder:
    """A `WaitingQueue` in which the shorter go first, within bounds.

    Args:
        rule: `kappa`: ``kappa * S`` seconds; `boost`, the plugin's default: jobs smaller than most go forward by up to
            ``2 * strength`` times the 95th percentile of latency.
        kappa: seconds for each token.
        max_boost_s: nobody goes forward by more.
        prefill_weight: size of a prompt token in generated ones.
        max_tokens: that an answer may have.
        headroom_tokens, headroom_share: an admission leaves so much of the cache free for each running job: the share
            of the tokens that it is expected to generate, at most so many; 16 where nothing is known.
        victims: whether it says who gives way, else the one that was admitted last does.
        max_evictions: after so many a job gives way only where nobody else is left.
        lengths: what is known; each engine of vLLM learns by itself.

    Raises:
        SimulationError: a rule of another name, or a negative number.
    """

    def __init__(
        self,
        rule: Literal["boost", "kappa"] = "boost",
        *,
        kappa: float = 0.02,
        strength: float = 0.9,
        max_boost_s: float = 300.0,
        prefill_weight: float = 0.2,
        max_tokens: int = 1 << 16,
        headroom_tokens: int = 64,
        headroom_share: float = 0.1,
        victims: bool = True,
        max_evictions: int = 3,
        lengths: OnlineLengths | None = None,
    ) -> None:
        numbers = (kappa, strength, max_boost_s, prefill_weight, headroom_tokens, headroom_share)
        if rule not in ("boost", "kappa") or min(numbers) < 0:
            raise SimulationError(f"length order: rule {rule!r} is boost or kappa, and its numbers are at least 0")
        self.rule, self.kappa, self.strength, self.max_boost_s = rule, kappa, strength, max_boost_s
        self.prefill_weight, self.max_tokens = prefill_weight, max_tokens
        self.headroom_tokens, self.headroom_share = headroom_tokens, headroom_share
        self.lengths = OnlineLengths() if lengths is None else lengths
        # See `Reserving`: what all running jobs have, each of them, and what was expected of a job when it arrived.
        self.headroom = 0
        # See `Choosing`: standings by job, with the tokens that they were made at.
        self.chooses, self.max_evictions = victims, max_evictions
        self._standings: dict[int, tuple[int, float]] = {}
        self._rooms: dict[int, int] = {}
        self._expected: dict[int, float] = {}
        # (key, number of arrival, job)
        self._heap: list[tuple[float, int, Job]] = []
        self._sequence = self._count = 0
        self._known: dict[int, tuple[float, int]] = {}
        self._learned, self._relearned = 0, 0.0
        # Those that arrived since the last step; and what jobs without tokens expect, as was worked out not long ago.
        self._fresh: list[tuple[int, Job]] = []
        self._alike: dict[tuple[str, ...], float | None] = {}
        self._alike_learned, self._alike_since = 0, 0.0
        self._scale = self._mean = 0.0
        self._sizes: deque[float] = deque(maxlen=_WINDOW)
        self._latencies: deque[float] = deque(maxlen=_WINDOW)
        self._came = self._ended = 0

    def push(self, job: Job, now: float) -> None:
        """See `WaitingQueue`. Its place is found with the next step, as an engine looks at arrivals between steps."""
        self._sequence += 1
        self._count += 1
        self._fresh.append((self._sequence, job))

    def _settle(self, now: float) -> None:
        """Place those that arrived, then look at all anew where it is time."""
        if self._alike_learned and (self._alike_learned >= _RELEARN_EVERY or now - self._alike_since >= _RELEARN_S):
            self._alike.clear()
            self._alike_learned, self._alike_since = 0, now
        fresh, self._fresh = self._fresh, []
        for sequence, job in fresh:
            self._arrived(sequence, job)
        if self._learned and self._due(now):
            self._relearn(now)

    def _arrived(self, sequence: int, job: Job) -> None:
        key, size = self._place(job, self._alike)
        self._known[job.number] = key, sequence
        if size > 0 and self.headroom_tokens:
            self._expected[job.number] = size - self._own(job)
        if size > 0:
            self._sizes.append(size)
            self._came += 1
            if self._came % _EVERY == 0:
                self._mean = sum(self._sizes) / len(self._sizes)
        heappush(self._heap, (key, sequence, job))

    def push_back(self, job: Job, now: float) -> None:
        """See `WaitingQueue`. It goes to its own place."""
        key, number = self._known[job.number]
        key = min(key, self._place(job, self._alike)[0])
        self._known[job.number] = key, number
        heappush(self._heap, (key, number, job))
        self._count += 1

    def peek(self, now: float) -> Job:
        """See `WaitingQueue`."""
        if self._fresh or self._learned:
            self._settle(now)
        return self._heap[0][2]

    def pop(self, now: float) -> Job:
        """See `WaitingQueue`."""
        if self._fresh:
            self._settle(now)
        job = heappop(self._heap)[2]
        self._count -= 1
        return job

    def left(self, job: Job, now: float) -> None:
        """See `Learner`."""
        self.forget(job)
        self.lengths.observe(_keys(job), job.output, now=now)
        self._learned += 1
        self._alike_learned += 1
        self._latencies.append(now - job.arrival)
        self._ended += 1
        if self._ended % _EVERY == 0:
            ordered = sorted(self._latencies)
            self._scale = self.strength * ordered[min(len(ordered) - 1, int(_QUANTILE * len(ordered)))]

    def forget(self, job: Job) -> None:
        """See `Keeper`."""
        self._known.pop(job.number, None)
        self._expected.pop(job.number, None)
        self._standings.pop(job.number, None)

    def admitted(self, job: Job) -> None:
        """See `Reserving`."""
        if not self.headroom_tokens:
            return
        rest = None if job.generated else self._expected.get(job.number)
        if rest is None:
            rest = self.lengths.remaining(_keys(job), job.generated, self.max_tokens)
        if rest is None:
            room = min(_UNKNOWN_ROOM, self.max_tokens - job.generated)
        else:
            room = math.ceil(self.headroom_share * rest)
        self._rooms[job.number] = room = max(min(self.headroom_tokens, room), 1)
        self.headroom += room

    def stopped(self, job: Job) -> None:
        """See `Reserving`."""
        self.headroom -= self._rooms.pop(job.number, 0)

    def standing(self, job: Job, generated: int) -> tuple[bool, float]:
        """See `Choosing`."""
        at, score = self._standings.get(job.number, (-_STEP, 0.0))
        if not 0 <= generated - at < _STEP:
            rest = self.lengths.remaining(_keys(job), generated, self.max_tokens)
            # Where nothing is known, who loses least.
            score = (1.0 if rest is None else rest) / (job.prompt - job.found + generated + 1)
            self._standings[job.number] = generated, score
        return job.preemptions < self.max_evictions, score

    def __len__(self) -> int:
        return self._count

    def _place(self, job: Job, alike: dict[tuple[str, ...], float | None]) -> tuple[float, float]:
        """The key that a job would have by what is known now, and its size; 0 where nothing is known."""
        keys = _keys(job)
        if job.generated or keys not in alike:
            remaining = self.lengths.remaining(keys, job.generated, self.max_tokens)
            if not job.generated:
                alike[keys] = remaining
        else:
            remaining = alike[keys]
        size = 0.0 if remaining is None else remaining + self._own(job)
        return job.arrival + self._offset(size), size

    def _own(self, job: Job) -> float:
        """The part of a size that its prompt is."""
        return self.prefill_weight * (job.prompt - job.cached)

    def _offset(self, size: float) -> float:
        if self.rule == "kappa":
            return self.kappa * size
        if size <= 0 or not self._mean or not self._scale:
            return 0.0
        shape = -math.log(-math.expm1(-_STEEPNESS * size / self._mean))
        return -min(self._scale * min(shape, _MOST), self.max_boost_s)

    def _due(self, now: float) -> bool:
        if self._learned * _SHARE < self._count:
            return False
        return self._learned >= _RELEARN_EVERY or now - self._relearned >= _RELEARN_S

    def _relearn(self, now: float) -> None:
        """Look at all that wait anew. Keys only fall."""
        self._learned, self._relearned = 0, now
        self._alike.clear()
        heap = []
        for _, number, job in self._heap:
            key = min(self._known[job.number][0], self._place(job, self._alike)[0])
            self._known[job.number] = key, number
            heap.append((key, number, job))
        heapify(heap)
        self._heap = heap


def _keys(job: Job) -> tuple[str, ...]:
    """Classes of jobs with lengths like this one's, most specific first; prompts within a third of an octave."""
    size = f"prompt:{round(2 ** (math.floor(3 * math.log2(job.prompt)) / 3))}"
    return (f"class:{job.label}|{size}", f"class:{job.label}", size) if job.label else (size,)
