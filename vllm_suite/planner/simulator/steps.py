"""A step that an engine decided on, how long it takes, and who sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from vllm_suite.planner.sources.steps import DecodeLine, Steps

if TYPE_CHECKING:
    from vllm_suite.planner.simulator.engine import Engine
    from vllm_suite.planner.simulator.jobs import Job


class Observer(Protocol):
    """Sees every run of steps, for timelines, occupancy and single gaps. It costs time: one call for each event."""

    def __call__(
        self, engine: Engine, start: float, end: float, count: int, steps: Steps, line: DecodeLine | None
    ) -> None:
        """`count` steps ended. `steps` is the first of them; `line` gives the times of each where they only decode."""
        ...


class Plan:
    """A step that was decided on, or a run of steps in which the same jobs decode.

    Attributes:
        steps: the first of them; empty in a run that nobody observes.
        seconds: of the first.
        line: times of each; None with prompts.
        count: steps.
        sampled, leaving: what `SimulatedScheduler._apply` returned; None until then.
    """

    __slots__ = ("count", "leaving", "line", "sampled", "seconds", "steps")

    def __init__(self, steps: Steps, seconds: float, line: DecodeLine | None, count: int) -> None:
        self.steps, self.seconds, self.line, self.count = steps, seconds, line, count
        self.sampled: Sequence[Job] | None = None
        self.leaving: Sequence[Job] = ()


EMPTY = Steps()


def hidden(line: DecodeLine, host: float) -> DecodeLine:
    """The same steps where the host's share of each overlaps with the step before it."""
    seconds = line.seconds - host
    if seconds >= host:
        return DecodeLine(seconds, line.slope, line.steps)
    until = math.ceil((host - seconds) / line.slope) if line.slope > 0 else math.inf
    return DecodeLine(host, 0.0, min(line.steps, until))


def last(run: Plan, count: int) -> Plan:
    """The step after the first `count` of a run."""
    line, steps = run.line, run.steps
    assert line is not None
    seconds = line.seconds + line.slope * count
    if steps is not EMPTY:
        own, context, longest, shortest = steps[4:]
        steps = Steps(0, 0, 0, 0, own, context + own * count, longest + count, shortest + count)
    return Plan(steps, seconds, DecodeLine(seconds, line.slope), 1)
