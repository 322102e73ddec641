"""A pipeline in which all batches only decode and nothing else happens, at a few additions for each batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_suite.planner.simulator.decoding import Decoding
from vllm_suite.planner.sources.steps import Steps

if TYPE_CHECKING:
    from vllm_suite.planner.simulator.pipeline import Pipeline

# Fewer batches than that are not worth setting out for.
_LEAST = 6


class _Course:
    """One cohort on its way.

    Attributes:
        decided, ended: batches so far.
        seconds, slope: of its next batch through all stages, and what each further one takes longer.
        last, last_slope: the same of the last stage.
        most: batches that may be decided on, and end.
        longest: between two ends of its batches.
    """

    __slots__ = ("cohort", "decided", "ended", "last", "last_slope", "longest", "most", "seconds", "slope")

    def __init__(self, pipeline: Pipeline, cohort: Decoding, most: int) -> None:
        source, engine = pipeline.engine.source, pipeline.engine
        self.cohort, self.decided, self.ended, self.longest = cohort, 0, 0, 0.0
        count, context, extremes = cohort.count, cohort.context, cohort.extremes()
        line = source.decode_line(count, context, *extremes)
        self.most = most = max(0, int(min(most, line.steps)))
        hidden = source.host_seconds(count) if engine.limits.async_scheduling else 0.0
        self.seconds, self.slope = line.seconds - hidden, line.slope
        if self.seconds < hidden:
            # The host is the slower one, until contexts have grown.
            self.most = 0
        first, then = (
            pipeline.slowest(Steps(0, 0, 0, 0, count, context + count * more, extremes[0] + more, extremes[1] + more))
            for more in (0, most)
        )
        self.last, self.last_slope = first, (then - first) / most if most else 0.0


def cruise(pipeline: Pipeline) -> None:
    """Take batches that end before anything else happens, and send the next ones on their way.

    It stops before one whose end completes a job, or after which blocks run out. The last stage's time is taken to grow
    linearly meanwhile.
    """
    engine, queue = pipeline.engine, pipeline.queue
    if engine.observer is not None or len(engine.waiting) or engine._partial is not None:
        return
    if any(batch.plan is not None and batch.plan.steps.prefill_chunks for batch in queue):
        return
    head = next((batch.plan for batch in queue if batch.plan is not None), None)
    if head is None or engine.clock.following - queue[0].end < _LEAST * head.seconds:
        return
    following, late = engine.clock.following, int(engine.limits.by_length and engine.limits.async_scheduling)
    courses: dict[Decoding, _Course] = {}
    for cohort in pipeline.cohorts:
        if cohort.late or cohort.ending:
            return
        if cohort.count:
            most = cohort.first() - cohort.ended - 1 - late
            if most < _LEAST:
                return
            courses[cohort] = _Course(pipeline, cohort, most)
    if (
        not courses
        or all(batch.plan is None for batch in queue)
        or following - queue[0].end < _LEAST * min(course.seconds for course in courses.values())
    ):
        return
    _sail(pipeline, courses, following)
    taken = 0
    for cohort, course in courses.items():
        taken += cohort.advance(course.decided)
        cohort.flying += course.decided - course.ended
        cohort.ended += course.ended
        engine.steps += course.ended
        if course.ended:
            cohort.longest.add(cohort.ended, course.longest)
    engine.free -= taken
    if engine.cache is not None:
        engine.cache.take(taken)


def _sail(pipeline: Pipeline, courses: dict[Decoding, _Course], following: float) -> None:
    queue, free_at, cohorts, last_end = pipeline.queue, pipeline.free_at, pipeline.cohorts, pipeline.last_end
    engine, ahead, stages = pipeline.engine, pipeline.engine.limits.async_scheduling, len(pipeline.free_at)
    free, others, busy, known_at = engine.free, range(stages - 1), 0.0, pipeline.known_at
    # All that is read of a batch's plan from now on is that it gives nobody a first token.
    plan = next(batch.plan for batch in queue if batch.plan is not None)
    while True:
        head = queue[0]
        if head.end >= following:
            break
        done = None
        if head.plan is not None:
            done = courses.get(head.cohort)
            if done is None:
                # Its jobs had their last tokens before.
                break
        # Ahead, cohorts take turns; else the one whose batch ended is next.
        course = courses.get(cohorts[pipeline.calls % stages]) if ahead else done
        if (done is not None and done.ended == done.most) or (course is not None and course.decided == course.most):
            break
        needed = course.cohort.due(course.cohort.step + course.decided) if course is not None else 0
        if needed > free:
            break
        now = head.end
        queue.popleft()
        if done is not None:
            index = cohorts.index(done.cohort)
            done.longest = max(done.longest, now - last_end[index])
            last_end[index] = now
            done.ended += 1
        pipeline.calls += 1
        if course is None:
            head.plan, head.end = None, max(now, queue[-1].end if queue else 0.0)
            queue.append(head)
            continue
        free -= needed
        seconds = course.seconds + course.slope * course.decided
        slowest = course.last + course.last_slope * course.decided
        course.decided += 1
        each = max(0.0, seconds - slowest) / (stages - 1)
        index = cohorts.index(course.cohort)
        head.start = at = max(now, free_at[0], known_at[index])
        for stage in others:
            at = free_at[stage] = max(at, free_at[stage]) + each
        head.end = free_at[-1] = known_at[index] = max(at, free_at[-1]) + slowest
        busy += max(seconds, slowest) / stages
        head.cohort, head.plan = course.cohort, plan
        queue.append(head)
    engine.busy += busy
