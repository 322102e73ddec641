"""The space of plans: what fits into memory, what vLLM accepts, what stands on the cluster; every plan once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import comb

from vllm_suite.planner.hardware import Cluster
from vllm_suite.planner.models import Model, ModelError, Parallel
from vllm_suite.planner.models.sharding import check
from vllm_suite.planner.plan import Plan, PlanError, PoolPlan, Role
from vllm_suite.planner.search.choices import Choices, Kind, Settings, roles
from vllm_suite.planner.search.place import domain, place

Shape = tuple[PoolPlan, ...]
"""One engine of each pool, `count` 1: a plan without its numbers of engines."""

Fits = Callable[[PoolPlan, bool], bool]
"""Whether an engine holds its weights and at least the longest request; the flag: it holds the model's encoder."""


@dataclass(frozen=True)
class Space:
    """Plans on one cluster.

    Attributes:
        items: whether requests have any; else no plan has an encode pool.
        fits: see `Fits`.
    """

    model: Model
    cluster: Cluster
    choices: Choices
    fits: Fits
    items: bool = False

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """Those for which there is a model, a workload and an engine."""
        encodes = self.items and self.model.encoder is not None
        return tuple(kind for kind in self.choices.kinds if encodes or not kind.startswith("encode"))

    def shapes(self, kind: Kind, level: int = 0) -> Iterator[Shape]:
        """Engines of each role together, small ones first.

        Args:
            level: 0 for every engine with the first settings of its role; 1 for those in which one pool has others;
                2 for the rest.
        """
        pools = [self._of(kind, role) for role in roles(kind)]
        found = (shape for shape in product(*pools) if sum(each.parallel.gpus for each in shape) <= self.cluster.gpus)
        ordered = sorted(found, key=lambda shape: sum(each.parallel.gpus for each in shape))
        return (shape for shape in ordered if min(2, self._changed(shape)) == level)

    def _of(self, kind: Kind, role: Role) -> tuple[PoolPlan, ...]:
        """Engines of a role in a kind. Encoder outputs are not taken by engines with pipeline stages."""
        encodes = kind.startswith("encode")
        found = self.engines(role, encoder=not encodes and role in ("any", "prefill"))
        return tuple(each for each in found if each.parallel.pp == 1) if encodes else found

    def _changed(self, shape: Shape) -> int:
        """How many of its pools have other settings than the first of their role."""
        return sum(
            Settings(each.max_num_seqs, each.max_num_batched_tokens) != self.choices.settings(each.role)[0]
            for each in shape
        )

    def engines(self, role: Role, *, encoder: bool = True) -> tuple[PoolPlan, ...]:
        """Every engine of a role that vLLM accepts and that fits, with each of its settings."""
        key = (role, encoder)
        if key not in self._engines:
            self._engines[key] = tuple(self._made(role, encoder))
        return self._engines[key]

    @cached_property
    def _engines(self) -> dict[tuple[Role, bool], tuple[PoolPlan, ...]]:
        return {}

    def _made(self, role: Role, encoder: bool) -> Iterator[PoolPlan]:
        choices = self.choices
        if role == "encode":
            for tp in choices.encode_tp:
                if tp <= self.cluster.gpus:
                    yield PoolPlan("encode", 1, Parallel(tp=tp))
            return
        late = role == "prefill" and any(layer.late for layer in self.model.layers)
        for parallel, quant in product(self._cuts(), choices.quants):
            if parallel.pp > 1 and choices.pp is None and role != "any":
                # vLLM's NIXL connector takes no pipeline stages on decode, and none were run on prefill.
                continue
            for settings in choices.settings(role):
                # A SwiftKV prefill instance without its late layers computes the same and holds less.
                pool = PoolPlan(
                    role, 1, parallel, quant, settings.seqs, settings.tokens, choices.kv_blocks, late_kv_only=late
                )
                if self.fits(pool, encoder):
                    yield pool

    def _cuts(self) -> Iterator[Parallel]:
        gpus, choices, moe = self.cluster.gpus, self.choices, self.model.moe
        reach = gpus if choices.wide_tp else domain(self.cluster)
        tensor = choices.tp or tuple(size for size in range(1, reach + 1) if reach % size == 0)
        pipeline, data = choices.pp or _powers(gpus), (choices.dp or _powers(gpus)) if moe else (1,)
        for tp, pp, dp, ep in product(tensor, pipeline, data, choices.ep if moe else (False,)):
            if tp > reach or tp * pp * dp > gpus or (ep and tp * dp == 1):
                continue
            parallel = Parallel(tp=tp, pp=pp, dp=dp, ep=ep)
            try:
                check(self.model, parallel)
            except ModelError:
                continue
            yield parallel

    def counts(self, shape: Shape) -> Iterator[tuple[int, ...]]:
        """Numbers of engines of each pool. Without `idle` no engine of any pool would still fit."""
        sizes = [each.parallel.gpus for each in shape]
        yield from _counts(sizes, self.cluster.gpus, self.choices.idle)

    def plan(self, shape: Shape, counts: Sequence[int]) -> Plan | None:
        """Shape and numbers on the cluster; None where the engines cannot stand there."""
        pools = tuple(replace(each, count=count) for each, count in zip(shape, counts, strict=True))
        return place(Plan(pools), self.cluster)

    def plans(self, level: int | None = None) -> Iterator[Plan]:
        """Every plan once, coarse levels first, then few pools, then small engines; of one level where it is given.

        Raises:
            PlanError: no engine fits at all.
        """
        self.check()
        for each in range(3) if level is None else (level,):
            for kind in self.kinds:
                for shape in self.shapes(kind, each):
                    for counts in self.counts(shape):
                        plan = self.plan(shape, counts)
                        if plan is not None:
                            yield plan

    def size(self, most: int = 10_000_000) -> int:
        """How many combinations of engines and numbers there are, counted without making them; stops at `most`."""
        total = 0
        for kind in self.kinds:
            sizes: list[dict[int, int]] = []
            for role in roles(kind):
                by_size: dict[int, int] = {}
                for each in self._of(kind, role):
                    by_size[each.parallel.gpus] = by_size.get(each.parallel.gpus, 0) + 1
                sizes.append(by_size)
            for combination in product(*(each.items() for each in sizes)):
                ways = 1
                for _, number in combination:
                    ways *= number
                total += ways * _ways([size for size, _ in combination], self.cluster.gpus, self.choices.idle)
                if total >= most:
                    return most
        return total

    def check(self) -> None:
        """Raises PlanError where no plan is possible: it says what the smallest cut of the model would need."""
        if any(next(self.shapes(kind, level), None) for kind in self.kinds for level in range(3)):
            return
        cut = [each for each in self._cuts()]
        tried = f"{len(cut)} cuts of it were tried" if cut else "vLLM accepts no cut of it"
        raise PlanError(
            f"no plan of {self.model.name} fits on {self.cluster.gpus} x {self.cluster.device.name}: {tried}; give more"
            " accelerators, a narrower format (--space quant=fp8) or shorter requests"
        )


def _powers(most: int) -> tuple[int, ...]:
    return tuple(2**index for index in range(most.bit_length()) if 2**index <= most)


def _counts(sizes: Sequence[int], gpus: int, idle: bool) -> Iterator[tuple[int, ...]]:
    size, rest = sizes[0], sizes[1:]
    if not rest:
        most = gpus // size
        yield from ((count,) for count in (range(1, most + 1) if idle else range(most, most + 1)) if count >= 1)
        return
    least = sum(rest)
    for count in range(1, (gpus - least) // size + 1):
        left = gpus - count * size
        for others in _counts(rest, left, idle):
            unused = left - sum(number * each for number, each in zip(others, rest, strict=True))
            if idle or unused < size:
                yield (count, *others)


def _ways(sizes: Sequence[int], gpus: int, idle: bool) -> int:
    """The number of `_counts`; for many accelerators of one size in closed form."""
    if len(set(sizes)) == 1 and not idle:
        total = gpus // sizes[0]
        return comb(total - 1, len(sizes) - 1) if total >= len(sizes) else 0
    if gpus > 32 and len(sizes) > 2:
        # Close enough to choose a method by.
        total = max(0, gpus // max(sizes) - 1)
        return max(1, total * total // 2)
    return sum(1 for _ in _counts(sizes, gpus, idle))


def room(limits: Callable[[PoolPlan, bool], int], longest_prompt: int, longest: int) -> Fits:
    """`Fits` from the tokens of cache that an engine has.

    Args:
        limits: tokens of an engine's cache; PlanError where its weights do not fit.
        longest_prompt, longest: tokens of the longest prompt, and of the longest prompt with its output.
    """

    def fits(pool: PoolPlan, encoder: bool) -> bool:
        try:
            tokens = limits(pool, encoder)
        except PlanError:
            return False
        return tokens >= (longest_prompt if pool.role == "prefill" else longest)

    return fits
