"""Which plans are looked at, and in which order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vllm_suite.planner.models import Parallel, Quantization
from vllm_suite.planner.plan import Plan, Role
from vllm_suite.planner.search.bounds import Bounds, PlanBound
from vllm_suite.planner.search.choices import Kind
from vllm_suite.planner.search.place import place
from vllm_suite.planner.search.simulated import PART, parts
from vllm_suite.planner.search.space import Shape, Space

WHOLE = 60_000
"""Combinations up to which every number of engines is looked at; beyond, those near the balance of the pools."""


UNEVEN = 2
"""The level of fleets that have to be simulated whole."""

Group = tuple[tuple[Role, int, Parallel, Quantization | None], ...]


@dataclass(frozen=True)
class Candidate:
    """A plan that is not placed yet.

    Attributes:
        level: 0 for the settings with the best estimate, 1 for the same engines with others, `UNEVEN` for large fleets
            of no equal parts, where there are such of equal parts too.
        fixed: its engines have their places already.
    """

    plan: Plan
    kind: Kind
    level: int
    bound: PlanBound
    fixed: bool = False

    @property
    def group(self) -> Group:
        """What it has in common with the plans that differ in settings alone."""
        return tuple((pool.role, pool.count, pool.parallel, pool.quant) for pool in self.plan.pools)

    @property
    def shape(self) -> Shape:
        """What it has in common with the plans that differ in numbers of engines alone."""
        return tuple(replace(pool, count=1, ranks=()) for pool in self.plan.pools)

    def placed(self, space: Space) -> Plan | None:
        """The plan on the cluster; None where it does not stand there."""
        return self.plan if self.fixed else place(self.plan, space.cluster)


def candidates(space: Space, bounds: Bounds) -> list[Candidate]:
    """Every plan of a space with its bounds, in each level the likely best first.

    In a space above `WHOLE` each shape comes with the few numbers of engines that its pools' estimates balance at.

    Raises:
        PlanError: no plan fits.
    """
    space.check()
    every = space.size(WHOLE + 1) <= WHOLE
    found: list[Candidate] = []
    for level in range(3):
        for kind in space.kinds:
            for shape in space.shapes(kind, level):
                for counts in space.counts(shape) if every else balanced(space, bounds, shape):
                    plan = Plan(tuple(replace(each, count=n) for each, n in zip(shape, counts, strict=True)))
                    found.append(Candidate(plan, kind, 0, bounds.plan(plan)))
    return ordered(found)


def ordered(found: list[Candidate]) -> list[Candidate]:
    """By level, and in each the likely best first."""
    # Sorts are stable: of equal estimates the plan with fewer pools, smaller engines and usual settings stays first.
    found = sorted(found, key=lambda each: -each.bound.estimate)
    seen: set[Group] = set()
    for index, each in enumerate(found):
        if each.group in seen:
            found[index] = replace(each, level=1)
        seen.add(each.group)
    found = _uneven_last(found)
    found.sort(key=lambda each: each.level)
    return found


def _uneven_last(found: list[Candidate]) -> list[Candidate]:
    """Large fleets that have no equal parts are another level, in kinds that have others."""
    whole = [each.plan.gpus // parts(each.plan) > 2 * PART for each in found]
    even = {each.kind for each, large in zip(found, whole, strict=True) if not large}
    return [
        replace(each, level=UNEVEN) if large and each.kind in even else each
        for each, large in zip(found, whole, strict=True)
    ]


def balanced(space: Space, bounds: Bounds, shape: Shape) -> Iterator[tuple[int, ...]]:
    """Numbers of engines with which every pool can serve about as much as the others, on all accelerators.

    DistServe's way: as many of each as a rate needs, for the highest rate at which they fit. Then what is left over
    goes to each of the pools in turn.
    """
    sizes = [each.parallel.gpus for each in shape]
    gpus = space.cluster.gpus
    apart = any(each.role == "encode" for each in shape)
    speeds = [bounds.speed(each, not apart and each.role in ("any", "prefill")) for each in shape]
    if len(shape) == 1 or not all(math.isfinite(speed) and speed > 0 for speed in speeds):
        yield from (counts for counts, _ in zip(space.counts(shape), range(3), strict=False))
        return

    def needed(rate: float) -> list[int]:
        return [max(1, math.ceil(rate / speed - 1e-9)) for speed in speeds]

    def fits(counts: list[int]) -> bool:
        return sum(count * size for count, size in zip(counts, sizes, strict=True)) <= gpus

    low, high = 0.0, gpus * max(speed / size for speed, size in zip(speeds, sizes, strict=True))
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(needed(middle)) else (low, middle)
    base = needed(low)
    if not fits(base):
        return
    seen: set[tuple[int, ...]] = set()
    for favoured in range(len(shape)):
        counts = list(base)
        for index in (favoured, *(other for other in range(len(shape)) if other != favoured)):
            spare = gpus - sum(count * size for count, size in zip(counts, sizes, strict=True))
            counts[index] += spare // sizes[index]
        if tuple(counts) not in seen:
            seen.add(tuple(counts))
            yield tuple(counts)
