"""The jobs of an engine that decode, as sums that cost nothing to advance by any number of steps."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from vllm_suite.planner.simulator.gaps import LongestSteps
from vllm_suite.planner.simulator.jobs import Job

_Entry = tuple[int, int, Job]


class Decoding:
    """Every job here gets one token in every step of its engine, so contexts, completions and blocks follow from the
    number of the step: a job that joins with context c before step s has context c - s + step from then on.

    Attributes:
        step: the next one to be decided on; steps with prompts count too.
        count: jobs.
        context: keys that they attend to in the next step, summed.
        ended: steps.
        flying: steps under way.
        longest: steps that ended.
        late: jobs that lost their cache while a step that gives them a token was under way.
        ending: jobs that have their last token with the next step that ends, and do not decode any more.
    """

    def __init__(self, block_size: int) -> None:
        self.step = self.count = self.context = self.ended = self.flying = 0
        self.longest = LongestSteps()
        self.late: list[Job] = []
        self.ending: list[Job] = []
        self._size = block_size
        # Jobs by the step, modulo the block size, in which they need another block.
        self._due = [0] * block_size
        # Heaps of (value, order of admission, job); entries of jobs that left stay until they surface or the heap is
        # mostly made of them.
        self._finish: list[_Entry] = []
        self._low: list[_Entry] = []
        self._high: list[_Entry] = []

    def join(self, job: Job) -> None:
        """A job has its `generated`-th token, which is not in the cache yet; it decodes from the next step on."""
        step = self.step
        job.cohort = self
        job.joined = step
        job.finish = step + job.output - job.generated
        job.base = base = job.target + 1 - step
        self.count += 1
        self.context += base + step
        self._due[(1 - base) % self._size] += 1
        heappush(self._finish, (job.finish, job.order, job))
        heappush(self._low, (base, job.order, job))
        heappush(self._high, (-base, job.order, job))
        if max(len(self._low), len(self._high)) > 4 * self.count + 64:
            for heap in (self._finish, self._low, self._high):
                heap[:] = [entry for entry in heap if _alive(entry)]
                heapify(heap)

    def leave(self, job: Job) -> None:
        """It completed or was preempted."""
        self.count -= 1
        self.context -= job.base + self.step
        self._due[(1 - job.base) % self._size] -= 1
        job.finish = -1

    def remaining(self, job: Job) -> int:
        """Tokens that it has yet to get."""
        return job.finish - self.step

    def held(self, job: Job) -> int:
        """Blocks of its computed tokens, which are those of its context without the newest."""
        return -(-(job.base + self.step - 1) // self._size)

    def needs(self, job: Job) -> bool:
        """Whether its next token starts a block."""
        return (job.base + self.step - 1) % self._size == 0

    def needed(self) -> int:
        """Blocks that the next step takes."""
        return self._due[self.step % self._size]

    def advance(self, count: int) -> int:
        """Go on by so many steps; the blocks that they took."""
        step, size, jobs = self.step, self._size, self.count
        self.step = step + count
        if not jobs:
            return 0
        self.context += jobs * count
        cycles, rest = divmod(count, size)
        first = step % size
        taken = cycles * jobs + sum(self._due[first : first + rest])
        if first + rest > size:
            taken += sum(self._due[: first + rest - size])
        return taken

    def run(self, free: int, late: int = 0) -> int:
        """Steps until the first job completes, or fewer: as many as these blocks suffice for.

        Args:
            late: steps for which a job stays after its last token.
        """
        heap = self._finish
        while not _current(heap[0]):
            heappop(heap)
        count = heap[0][0] - self.step + late
        if (count // self._size + 1) * self.count <= free:
            return count
        cycles, free = divmod(free, self.count)
        most, due, size = cycles * self._size, self._due, self._size
        while most < count and due[(self.step + most) % size] <= free:
            free -= due[(self.step + most) % size]
            most += 1
        return min(count, most)

    def ready(self) -> bool:
        """Whether a job may have its last token after the steps that ended."""
        return bool(self._finish) and self._finish[0][0] <= self.ended

    def complete(self, step: int) -> Iterator[Job]:
        """The jobs that have their last token after so many steps, in order of admission; leave each."""
        heap = self._finish
        while heap and (heap[0][0] <= step or not _current(heap[0])):
            entry = heappop(heap)
            if _current(entry):
                yield entry[2]

    def first(self) -> int:
        """After which step the first job is complete. There has to be a job."""
        heap = self._finish
        while not _current(heap[0]):
            heappop(heap)
        return heap[0][0]

    def due(self, step: int) -> int:
        """Blocks that a later step takes, where nobody joins or leaves before it."""
        return self._due[step % self._size]

    def extremes(self) -> tuple[int, int]:
        """The longest and the shortest context of the next step. There has to be a job."""
        low, high = self._low, self._high
        while not _alive(low[0]):
            heappop(low)
        while not _alive(high[0]):
            heappop(high)
        return self.step - high[0][0], self.step + low[0][0]


def _alive(entry: _Entry) -> bool:
    return entry[2].order == entry[1] and entry[2].finish >= 0


def _current(entry: _Entry) -> bool:
    return entry[2].order == entry[1] and entry[2].finish == entry[0]
