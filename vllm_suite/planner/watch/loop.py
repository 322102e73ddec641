"""The watch itself: look, test, replan, decide, say so."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from prometheus_client import CollectorRegistry

from vllm_suite.planner.plan import Plan
from vllm_suite.planner.traces.workload import Workload
from vllm_suite.planner.watch.decide import Decision, decide, difference
from vllm_suite.planner.watch.recorded import Recorded
from vllm_suite.planner.watch.series import WatchSeries
from vllm_suite.planner.watch.shift import ShiftTest
from vllm_suite.planner.watch.window import WatchError, Window, workload_of

_KEPT = 4  # times the windows of a look


class Source(Protocol):
    """Where windows come from: `Prometheus` or `Recorded`."""

    def windows(self, start: float, end: float) -> list[Window]:
        """Those between two times. Raises WatchError."""
        ...


class Planner(Protocol):
    """What the search is asked."""

    def best(self, workload: Workload) -> Plan | None:
        """The best plan for a workload; None where none meets the targets."""
        ...

    def goodput(self, plan: Plan, workload: Workload) -> float:
        """Requests per second that a plan serves within the targets; 0 for one that cannot."""
        ...


@dataclass(frozen=True)
class Settings:
    """How to watch.

    Attributes:
        reference: windows that the running plan is taken to be made for, at the start and after each change.
        recent: windows of a look.
        confirm: looks in a row that have to find a shift: a shift that passes within that time changes nothing. Then
            the plan waits until the recent windows agree with each other.
        every: seconds between looks.
        restart_s, horizon_s, margin: see `decide`.
    """

    reference: int = 30
    recent: int = 10
    confirm: int = 2
    every: float = 60.0
    restart_s: float = 120.0
    horizon_s: float = 3600.0
    margin: float = 0.1
    test: ShiftTest = field(default_factory=ShiftTest)


def watch(
    source: Source,
    plan: Plan,
    planner: Planner,
    *,
    settings: Settings | None = None,
    say: Callable[[str], object] = print,
    changed: Callable[[Plan, Workload], object] | None = None,
    record: Path | None = None,
    looks: int | None = None,
    series: WatchSeries | None = None,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], object] = time.sleep,
) -> Plan:
    """Watch a fleet until interrupted, or for some looks.

    A recorded file is gone through from its beginning, as if its windows came in one after the other, and the watch
    ends with it. Of a Prometheus server the reference is what lies before the first look. A look that fails is said
    and tried again at the next one; the first has to succeed.

    Args:
        plan: that is running.
        say: gets a line for each thing that happens.
        changed: called with each new plan and the traffic it is for, to write a fleet file.
        record: file for the windows seen, which `Recorded` reads.
        looks: at most; None for no limit.
        series: to keep up to date.

    Returns:
        The plan at the end.

    Raises:
        WatchError: nothing can be read at the first look.
    """
    settings = settings or Settings()
    series = series or WatchSeries(CollectorRegistry())
    state = _State(plan, planner, settings, say, changed, series)
    if isinstance(source, Recorded):
        for window in source.windows():
            state.add(window)
            if looks is not None and state.looks >= looks:
                break
        if not state.looks:
            say(f"{len(state.windows)} windows are fewer than the {settings.reference + settings.recent} of a look")
        return state.plan
    now = clock()
    step = float(getattr(source, "step", settings.every))
    since = now - (settings.reference + settings.recent) * step
    # What is older is not kept, and a server gives only so many points at once.
    most = _KEPT * (settings.reference + settings.recent) * step
    done = 0
    while looks is None or done < looks:
        try:
            for window in source.windows(max(since, clock() - most), clock()):
                since = window.start + window.seconds
                state.add(window)
            series.looked("ok")
        except WatchError as error:
            if not state.windows:
                raise
            series.looked("failed")
            say(f"look failed, and is tried again: {error}")
        if record is not None and state.windows:
            Recorded(record).write(state.windows)
        done += 1
        if looks is None or done < looks:
            sleep(settings.every)
    return state.plan


class _State:
    def __init__(
        self, plan: Plan, planner: Planner, settings: Settings, say: Callable[[str], object],
        changed: Callable[[Plan, Workload], object] | None, series: WatchSeries,
    ) -> None:  # fmt: skip
        self.series = series
        self.plan, self.planner, self.settings, self.say, self.changed = plan, planner, settings, say, changed
        self.windows: list[Window] = []
        self.reference: list[Window] = []
        self.looks = self._confirmed = self._after = 0

    def add(self, window: Window) -> None:
        """The next window; a look where there are enough."""
        settings = self.settings
        if self.windows and _bounds(window) != _bounds(self.windows[-1]):
            self.say(f"at {window.start:.0f}: the engines count lengths in other buckets; what was seen is left out")
            self.windows, self.reference, self._confirmed = [], [], 0
        self.windows.append(window)
        del self.windows[: -_KEPT * (settings.reference + settings.recent)]
        self.series.saw("now", self.windows[-settings.recent :])
        if not self.reference:
            if len(self.windows) < settings.reference:
                return
            self._stands_for(self.windows[-settings.reference :])
            return
        self._after += 1
        if self._after >= settings.recent:
            self._look(self.windows[-settings.recent :])

    def _look(self, recent: list[Window]) -> None:
        self.looks += 1
        shifts = self.settings.test.shifts(self.reference, recent)
        self._confirmed = self._confirmed + 1 if shifts else 0
        if self._confirmed < self.settings.confirm or not self._settled(recent):
            return
        self.say(f"at {recent[-1].start:.0f}: shift of {'; '.join(map(str, shifts))}")
        self.series.shifted(shifts)
        try:
            workload = workload_of(recent)
        except WatchError as error:
            self.say(f"  no plan: {error}")
            self._confirmed = 0
            return
        self._replan(workload)
        # What the fleet runs on now is the traffic of now, whether the plan changed or not.
        self._stands_for(recent)
        self._confirmed = 0

    def _stands_for(self, windows: list[Window]) -> None:
        """The plan is taken to be for these."""
        self.reference, self._after = windows, 0
        self.series.saw("plan", windows)

    def _settled(self, recent: list[Window]) -> bool:
        """Whether the new traffic is all that the recent windows hold, or has been coming for long enough.

        A plan for half of the old and half of the new would be right for neither.
        """
        half = len(recent) // 2
        if half == 0 or self._confirmed >= self.settings.confirm + 2 * len(recent):
            return True
        return not self.settings.test.shifts(recent[:half], recent[half:])

    def _replan(self, workload: Workload) -> None:
        best = self.planner.best(workload)
        if best is None:
            self.say("  no plan meets the targets for it; the running one stays")
            self.series.replanned("no_plan")
            return
        decision = self._decision(best, workload)
        if not decision.change:
            self.say(f"  keep {self.plan.name}: {decision.reason}")
            return
        for line in difference(self.plan, best).lines:
            self.say(f"  {line}")
        self.say(f"  change to {best.name}: {decision.reason}")
        self.plan = best
        if self.changed is not None:
            self.changed(best, workload)

    def _decision(self, best: Plan, workload: Workload) -> Decision:
        assert workload.rate is not None
        settings = self.settings
        running, new = self.planner.goodput(self.plan, workload), self.planner.goodput(best, workload)
        decision = decide(
            self.plan,
            best,
            rate=workload.rate,
            old_goodput=running,
            new_goodput=new,
            restart_s=settings.restart_s,
            horizon_s=settings.horizon_s,
            margin=settings.margin,
        )
        self.series.replanned("changed" if decision.change else "kept", running, new)
        return decision


def _bounds(window: Window) -> tuple[tuple[float, ...], ...]:
    return window.prompts.bounds, window.outputs.bounds
