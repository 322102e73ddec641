"""A request on its way through the simulator, and the order in which an engine takes those that wait."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from vllm_suite.planner.simulator.decoding import Decoding


class SimulationError(ValueError):
    """What is asked for cannot be simulated; the text says which request or setting and why."""


@dataclass(slots=True, eq=False)
class Job:
    """One request. Times are seconds of the virtual clock, lengths are tokens.

    Attributes:
        number: unique; breaks ties.
        arrival: when it reaches the system.
        prompt, output: lengths, at least 1.
        cached: tokens at the start of the prompt whose keys and values need no computing at the first admission:
            received from another instance, or found in a cache that is not simulated. Below `prompt`. They take blocks
            as others do.
        prefix: ids of the blocks of `block` tokens that the prompt begins with; equal ids after equal ids are equal
            content. Looked at where the engine has `prefix_caching`.
        label: class of the request, for orders that know its length from it.
        found: tokens of the prompt that the engine found in its prefix cache at the first admission.
        first_scheduled, first_token, last_token: nan until it happened.
        longest_gap: longest time between two of its tokens; 0 for one token.
        preemptions: how often it lost its cache and was computed again.

    The rest is the engine's: `target` tokens to compute before the next one is sampled, `done` of them, `held` blocks
    while it is in prefill; in decode the step `finish` after which it is complete (-1 otherwise), `base` (its context
    minus the engine's step) and the step `joined` since which its gaps are the engine's steps. `order` counts
    admissions, `generated` tokens up to the last admission or preemption. `cohort` are the jobs that it decodes with,
    `flying` counts steps under way that it takes part in though it lost its cache.
    """

    number: int
    arrival: float
    prompt: int
    output: int
    cached: int = 0
    prefix: tuple[int, ...] = ()
    block: int = 512
    label: str = ""
    found: int = 0
    first_scheduled: float = float("nan")
    first_token: float = float("nan")
    last_token: float = float("nan")
    longest_gap: float = 0.0
    preemptions: int = 0
    generated: int = 0
    target: int = 0
    done: int = 0
    held: int = 0
    order: int = -1
    finish: int = -1
    base: int = 0
    joined: int = 0
    cohort: Decoding | None = None
    flying: int = 0

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.output < 1 or not 0 <= self.cached < self.prompt:
            raise SimulationError(
                f"request {self.number}: prompt {self.prompt} and output {self.output} have to be at least 1 token,"
                f" cached {self.cached} at least 0 and less than the prompt"
            )

    @property
    def gaps(self) -> int:
        """Gaps between tokens."""
        return self.output - 1

    @property
    def ttft(self) -> float:
        """Seconds from arrival to the first token."""
        return self.first_token - self.arrival

    @property
    def tpot(self) -> float:
        """Mean gap between tokens in seconds; 0 for one token, as vLLM's benchmark has it."""
        return (self.last_token - self.first_token) / (self.output - 1) if self.output > 1 else 0.0


class WaitingQueue(Protocol):
    """Which of the waiting jobs an engine admits next.

    It is asked whenever the engine schedules a step that could admit one. While all running jobs decode and none
    arrives or completes it is not asked, so an order that changes with time alone is seen at the next of these events.
    """

    def push(self, job: Job, now: float) -> None:
        """A job arrived."""
        ...

    def push_back(self, job: Job, now: float) -> None:
        """A running job was preempted; jobs that are preempted in one step come last of running first."""
        ...

    def peek(self, now: float) -> Job:
        """The next job. Only called where there is one."""
        ...

    def pop(self, now: float) -> Job:
        """Take what `peek` showed."""
        ...

    def __len__(self) -> int: ...


@runtime_checkable
class Learner(Protocol):
    """A waiting queue whose order depends on what it learns from jobs that end."""

    def left(self, job: Job, now: float) -> None:
        """A job that this engine generated has its last token."""
        ...


@runtime_checkable
class Keeper(Protocol):
    """A waiting queue that remembers jobs after it gave them out, in case they come back."""

    def forget(self, job: Job) -> None:
        """A job left that got its first tokens here and gets the others elsewhere: it does not come back."""
        ...


@runtime_checkable
class Reserving(Protocol):
    """A waiting queue that lets jobs in only where those that run keep room to grow.

    Attributes:
        headroom: tokens of cache that an admission leaves free while any job runs.
    """

    headroom: int

    def admitted(self, job: Job) -> None:
        """A job runs, or does so again. It counts from the next step on."""
        ...

    def stopped(self, job: Job) -> None:
        """It ended or was preempted."""
        ...


@runtime_checkable
class Choosing(Protocol):
    """A waiting queue that also says who of the running gives way where blocks run out.

    Attributes:
        chooses: False where it is the one that was admitted last.
    """

    chooses: bool

    def standing(self, job: Job, generated: int) -> tuple[bool, float]:
        """The place of a running job with so many tokens; the highest gives way."""
        ...


class FirstCome:
    """First come, first served: vLLM's default. A preempted job goes to the front."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()

    def push(self, job: Job, now: float) -> None:
        """See `WaitingQueue`."""
        self._jobs.append(job)

    def push_back(self, job: Job, now: float) -> None:
        """See `WaitingQueue`."""
        self._jobs.appendleft(job)

    def peek(self, now: float) -> Job:
        """See `WaitingQueue`."""
        return self._jobs[0]

    def pop(self, now: float) -> Job:
        """See `WaitingQueue`."""
        return self._jobs.popleft()

    def __len__(self) -> int:
        return len(self._jobs)
