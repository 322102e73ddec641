"""What a plan can reach at most, and about, from a source's times alone: cheap enough to ask of every plan.

Nothing is simulated. A request is never faster than on an idle engine, an engine never has more requests behind it than
its largest steps allow. Both hold for a source whose steps get no shorter with more work, which all of them are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from vllm_suite.planner.plan import Plan, PoolPlan, Role, Slo
from vllm_suite.planner.search.horizon import Horizon
from vllm_suite.planner.simulator.setting import Setting
from vllm_suite.planner.sources.base import FloatArray, LatencySource
from vllm_suite.planner.sources.steps import Steps
from vllm_suite.planner.workload import Item, Request

BUBBLES = 0.6
"""What an estimate leaves of an engine with pipeline stages: prompts make its batches unequal, and stages wait."""


@dataclass(frozen=True)
class Lengths:
    """A sample of a workload as arrays over requests.

    Attributes:
        prompts, outputs: tokens.
        cached: tokens at the start of the prompt that an engine may have in its prefix cache, at most.
        items: of each request.
    """

    prompts: FloatArray
    outputs: FloatArray
    cached: FloatArray
    items: tuple[tuple[Item, ...], ...]

    @classmethod
    def of(cls, requests: Sequence[Request]) -> Lengths:
        """Of a sample, at least one request; a prefix counts as cached where its first block was seen before."""
        seen: set[int] = set()
        cached = []
        for request in requests:
            shared = 0
            for block in request.prefix:
                if block not in seen:
                    break
                shared += 1
            seen.update(request.prefix)
            # The last token is always computed.
            cached.append(min(request.prompt - 1, shared * request.block))
        return cls(
            np.array([request.prompt for request in requests], dtype=float),
            np.array([request.output for request in requests], dtype=float),
            np.array(cached, dtype=float),
            tuple(request.items for request in requests),
        )

    @property
    def computed(self) -> FloatArray:
        """Tokens of each prompt that are computed at least."""
        return self.prompts - self.cached

    @cached_property
    def kinds(self) -> tuple[tuple[Item, ...], ...]:
        """The different sets of items."""
        return tuple(dict.fromkeys(self.items))

    @cached_property
    def of_kind(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Of each request the index of its set of items."""
        index = {items: place for place, items in enumerate(self.kinds)}
        return np.array([index[items] for items in self.items])

    @cached_property
    def decoded(self) -> float:
        """Mean tokens of a request after the first."""
        return float(np.mean(self.outputs - 1))

    @cached_property
    def context(self) -> float:
        """Mean context of a decoded token."""
        steps = self.outputs - 1
        total = float(steps.sum())
        return float((steps * (self.prompts + self.outputs / 2)).sum() / total) if total else float(self.prompts.mean())


@dataclass(frozen=True)
class EngineBound:
    """Of one engine of a pool.

    Attributes:
        first: of each request the seconds of its prompt on an idle engine; of an encoder, of its items.
        gap: of each request the seconds between two tokens where it decodes alone.
        prefill_s, decode_s, encode_s: seconds of the engine that one request takes at least, in the largest steps;
            `decode_s` in steps no longer than the target allows.
        mixed: requests per second of an engine about, whose decode steps share its time with prompts, at the target.
    """

    first: FloatArray
    gap: FloatArray
    prefill_s: float = 0.0
    decode_s: float = 0.0
    encode_s: float = 0.0
    mixed: float = math.inf


@dataclass(frozen=True)
class PlanBound:
    """Of a plan.

    Attributes:
        rate: requests per second that it serves within the targets at most.
        estimate: requests per second that it may well reach; an order to look at plans in, no more.
        attainment: share of requests that meet the targets at no load at most.
        latency: mean seconds of a request at no load, at least.
        ttft, tpot: seconds at no load that the wanted share of requests stays under, at least.
        stage: the pool that limits the rate.
    """

    rate: float
    estimate: float
    attainment: float
    latency: float
    ttft: float
    tpot: float
    stage: Role


class Bounds:
    """Bounds of the plans for one setting, workload and pair of targets.

    Args:
        requests: a sample of the workload; all of it where it is short.
        horizon: of the simulations that are bounded: over a short time an engine may leave some requests for
            afterwards. None for endless ones.
    """

    def __init__(self, setting: Setting, requests: Sequence[Request], slo: Slo, horizon: Horizon | None = None) -> None:
        self.setting, self.slo, self.horizon = setting, slo, horizon
        self.lengths = Lengths.of(requests)
        # Short prompts go straight to a decode instance.
        self.short = self.lengths.prompts < setting.serving.min_prompt_tokens
        self._known: dict[tuple[PoolPlan, bool], EngineBound] = {}

    def engine(self, pool: PoolPlan, encodes: bool = False) -> EngineBound:
        """Of one engine of a pool; `encodes`: it encodes the items of its requests itself."""
        # What one engine does depends neither on how many there are nor on where they stand.
        key = (PoolPlan(pool.role, 1, pool.parallel, pool.quant, pool.max_num_seqs, pool.max_num_batched_tokens,
                        pool.kv_blocks, pool.max_items, pool.late_kv_only), encodes)  # fmt: skip
        if key not in self._known:
            self._known[key] = self._engine(*key)
        return self._known[key]

    def _engine(self, pool: PoolPlan, encodes: bool) -> EngineBound:
        lengths = self.lengths
        nothing = np.zeros_like(lengths.prompts)
        items = self._items(pool) if encodes or pool.role == "encode" else nothing
        if pool.role == "encode":
            return EngineBound(items, nothing, encode_s=float(items.mean()))
        source, dp = Device(self.setting.source(pool), self.setting.async_scheduling), pool.parallel.dp
        gap, decode, mixed = nothing, 0.0, math.inf
        first = alone(source, lengths.computed, lengths.cached, pool.max_num_batched_tokens) + items
        prefill = self._prefill(source, pool) / dp
        if pool.role != "prefill":
            gap = source.seconds(Steps(decode_sequences=np.ones_like(nothing), decode_context=lengths.prompts + 1))
            beside = prefill * dp + float(items.mean())
            decode, mixed = self._decode(source, pool, encodes, beside)
            decode, mixed = decode / dp, mixed * dp
        return EngineBound(first, gap, prefill, decode, float(items.mean()), mixed)

    def _items(self, pool: PoolPlan) -> FloatArray:
        """Seconds of the items of each request, one after the other on one engine."""
        seconds = self.setting.encode_seconds
        if seconds is None:
            return np.zeros_like(self.lengths.prompts)
        each = [sum(seconds(pool, item) for item in items) for items in self.lengths.kinds]
        return np.array(each)[self.lengths.of_kind]

    def _prefill(self, source: Device, pool: PoolPlan) -> float:
        """Seconds of an engine for a request's prompt at least: in the step size that is best per token."""
        lengths, budget = self.lengths, pool.max_num_batched_tokens
        here = {"prefill": ~self.short, "decode": self.short}.get(pool.role, np.ones_like(self.short))
        tokens = np.where(here, lengths.computed, 0.0)
        if not tokens.any():
            return 0.0
        pairs = float((tokens * lengths.cached + tokens * (tokens + 1) / 2).sum() / tokens.sum())
        sizes = np.unique(np.append(np.minimum(2 ** np.arange(0, 24), budget), budget)).astype(float)
        ones = np.ones_like(sizes)
        times = source.seconds(Steps(sizes, ones, 0 * sizes, sizes * pairs))
        return float(tokens.mean() * (times / sizes).min()) / source.stages

    def _decode(self, source: Device, pool: PoolPlan, encodes: bool, beside: float) -> tuple[float, float]:
        """Seconds of an engine for a request's tokens at least; and `EngineBound.mixed`.

        Args:
            beside: seconds of the engine for the request's prompt and items.
        """
        lengths, slo = self.lengths, self.slo
        if lengths.decoded == 0:
            return 0.0, math.inf
        limits = self.setting.limits(pool, encoder=encodes)
        held = limits.blocks * limits.block_size / lengths.context
        # With stages each of them has a share of the sequences at a time.
        most = max(1, math.ceil(min(pool.max_num_seqs, math.ceil(held)) / source.stages))
        count = np.arange(1.0, most + 1)
        times = source.seconds(Steps(decode_sequences=count, decode_context=count * lengths.context))
        rates = count / times * source.stages
        seconds = lengths.decoded / float(rates.max())
        # n sequences of a stage get a token in T(n) of the time that prompts leave: gap = T(n) + all x beside / tokens.
        every = count * source.stages
        gaps = times + every * beside / lengths.decoded
        together = every / (lengths.decoded * gaps) * (BUBBLES if source.stages > 1 else 1.0)
        if slo.tpot is None:
            return seconds, float(together.max())
        within = np.flatnonzero(times <= slo.tpot)
        if not within.size:
            return math.inf, 0.0
        # Those that meet the target may be the short ones, and no more of them than are asked for.
        kept = np.sort(lengths.outputs - 1)[: max(1, math.ceil(slo.attainment * lengths.outputs.size))]
        wanted = float(kept.sum() / lengths.outputs.size)
        mixed = together[gaps <= slo.tpot]
        # With requests that are mostly prompt the gaps of a few are long, and those of the others are not.
        likely = float(mixed.max()) if mixed.size else 0.5 / (beside + lengths.decoded * float(times[0]))
        return max(seconds, wanted / float(rates[within].max())), likely

    def plan(self, plan: Plan) -> PlanBound:
        """Of a plan; its engines are shared with the plans that were asked for before."""
        lengths, slo = self.lengths, self.slo
        encoders = plan.pool("encode")
        engines: dict[Role, tuple[PoolPlan, EngineBound]] = {}
        for pool in plan.pools:
            engines[pool.role] = (pool, self.engine(pool, encoders is None and pool.role != "decode"))
        first, gap = np.zeros_like(lengths.prompts), np.zeros_like(lengths.prompts)
        for role, (pool, bound) in engines.items():
            if role == "encode":
                # Items, and their pieces, may be dealt out over all encoders.
                first = first + bound.first / pool.count
            elif role == "prefill":
                first = first + np.where(self.short, 0.0, bound.first)
            elif role == "decode":
                first = first + np.where(self.short, bound.first, 0.0)
            else:
                first = first + bound.first
            gap = np.maximum(gap, bound.gap)
        meets = np.ones_like(first, dtype=bool)
        if slo.ttft is not None:
            meets &= first <= slo.ttft
        if slo.tpot is not None:
            meets &= (gap <= slo.tpot) | (lengths.outputs <= 1)
        attainment = float(meets.mean())
        rates = {role: self._rate(pool, bound) for role, (pool, bound) in engines.items()}
        stage = min(rates, key=lambda role: rates[role])
        reachable = attainment >= slo.attainment
        return PlanBound(
            rate=rates[stage] if reachable else 0.0,
            estimate=min(self._estimate(pool, bound) for pool, bound in engines.values()) if reachable else 0.0,
            attainment=attainment,
            latency=float((first + (lengths.outputs - 1) * gap).mean()),
            ttft=float(np.quantile(first, slo.attainment, method="lower")),
            tpot=float(np.quantile(gap, slo.attainment, method="lower")),
            stage=stage,
        )

    def speed(self, pool: PoolPlan, encodes: bool = False) -> float:
        """Requests per second of one engine of a pool about."""
        return self._estimate(replace(pool, count=1), self.engine(pool, encodes))

    def _rate(self, pool: PoolPlan, bound: EngineBound) -> float:
        """Requests per second of a pool at most."""
        # Prompts and decoded tokens may share steps: a step is at least as long as either part of it alone.
        seconds = max(bound.prefill_s + bound.encode_s, bound.decode_s) / pool.count
        if seconds == 0:
            return math.inf
        if self.horizon is None:
            return 1 / seconds
        return self.horizon.after(self.horizon.residence, seconds) / seconds

    def _estimate(self, pool: PoolPlan, bound: EngineBound) -> float:
        """Requests per second of a pool about: waiting for prefill as in M/D/1, decode slowed by the prompts beside."""
        service = (bound.prefill_s + bound.encode_s) / (BUBBLES if pool.parallel.pp > 1 else 1.0)
        if not service:
            return pool.count * bound.mixed
        share = 1.0
        if self.slo.ttft is not None:
            late = float(np.quantile(bound.first, self.slo.attainment))
            spare = (self.slo.ttft - late) / max(service, float(bound.first.mean()))
            share = _load(spare * pool.count, 1 - self.slo.attainment)
        return pool.count * min(share / service, bound.mixed)


class Device:
    """A source's steps without what the host adds to them, where it is a step ahead."""

    def __init__(self, source: LatencySource, ahead: bool) -> None:
        self.source, self.ahead, self.stages = source, ahead, source.stages

    def seconds(self, steps: Steps) -> FloatArray:
        """Of arrays of steps."""
        seconds = self.source.seconds(steps)
        if not self.ahead:
            return seconds
        sizes = np.asarray(steps.sequences, dtype=int)
        known = {size: self.source.host_seconds(int(size)) for size in np.unique(sizes)}
        host = np.vectorize(known.__getitem__, otypes=[float])(sizes)
        found: FloatArray = np.maximum(seconds - host, host)
        return found


def alone(source: Device, tokens: FloatArray, cached: FloatArray, budget: int) -> FloatArray:
    """Seconds of prompts on an idle engine, in chunks of its token budget; stages work on successive chunks at once."""
    left, done = tokens.copy(), cached.copy()
    total = np.zeros_like(left)
    while True:
        chunk = np.minimum(left, budget)
        busy = chunk > 0
        if not busy.any():
            return total
        now = chunk[busy]
        pairs = now * done[busy] + now * (now + 1) / 2
        seconds = source.seconds(Steps(now, np.ones_like(now), done[busy], pairs))
        last = left[busy] <= budget
        total[busy] += np.where(last, seconds, seconds / source.stages)
        left, done = left - chunk, done + chunk


def _load(spare: float, late: float) -> float:
    """The load at which a share `late` waits longer than `spare` services, by the usual exponential tail of M/D/1."""
    if spare <= 0:
        return 0.05
    low, high = 0.0, 1.0
    for _ in range(30):
        load = (low + high) / 2
        if load * math.exp(-2 * (1 - load) * spare) <= late:
            low = load
        else:
            high = load
    return max(0.05, low)
