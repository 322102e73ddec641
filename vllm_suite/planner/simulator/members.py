"""The instances of a simulated fleet, by role, as the router knows them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count

from vllm_suite.planner.plan import Plan, PlanError, PoolPlan, Role
from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.counters import PoolRun, encode_run, pool_run
from vllm_suite.planner.simulator.encode_stage import EncodeStage
from vllm_suite.planner.simulator.encoders import EncodeObserver, Encoder
from vllm_suite.planner.simulator.engine import Observer
from vllm_suite.planner.simulator.handover import Lease, Leases, Place
from vllm_suite.planner.simulator.instances import Hosted, Leg, Receiving
from vllm_suite.planner.simulator.jobs import Job
from vllm_suite.planner.simulator.lockstep import Lockstep
from vllm_suite.planner.simulator.overlap import Overlapping
from vllm_suite.planner.simulator.routing import Instance, PrefixHistory
from vllm_suite.planner.simulator.setting import Setting
from vllm_suite.planner.simulator.step_sources import LastTokens, OwnEncoder
from vllm_suite.planner.simulator.token_cache import TokenCache
from vllm_suite.planner.sources.base import LatencySource
from vllm_suite.planner.workload import Item


class Way:
    """What instances report to: the way of a request through the pools."""

    def prefilled(self, instance: Instance, job: Job, now: float) -> None:
        """A prompt was computed and its blocks are kept."""
        raise NotImplementedError

    def finished(self, instance: Instance, job: Job, now: float) -> None:
        """A request has its last token."""
        raise NotImplementedError

    def pull(self, instance: Instance, leg: Leg, blocks: int, now: float) -> bool:
        """Start to fetch a cache."""
        raise NotImplementedError

    def expired(self, instance: Instance, lease: Lease, now: float) -> None:
        """Nobody fetched blocks in time."""
        raise NotImplementedError


class Members:
    """Makes the instances of a plan and keeps those that take work.

    The data-parallel ranks of an engine are instances of their own, for the router too, and step together.

    Attributes:
        active: instances that take work, by role; without encoders.
        ever: all that there were, for counters.
        encoders, every_encoder: the same of the encode pool.
        stage: the encode stage; None where there is no encode pool.
    """

    def __init__(self, plan: Plan, setting: Setting, clock: Clock, way: Way, observer: Observer | None) -> None:
        self.plan, self.setting, self.clock, self.way, self.observer = plan.placed(), setting, clock, way, observer
        self._numbers = count()
        encode = self.plan.pool("encode")
        serving = [pool for pool in self.plan.pools if pool.role != "encode"]
        self._sources = {pool.role: setting.source(pool) for pool in serving}
        self._limits = {pool.role: setting.limits(pool, encoder=setting.encodes(self.plan, pool)) for pool in serving}
        self.active: dict[Role, list[Instance]] = {pool.role: [] for pool in serving}
        self.ever: dict[Role, list[Instance]] = {pool.role: [] for pool in serving}
        self.encoders: list[Encoder] = []
        self.every_encoder: list[Encoder] = []
        self.stage: EncodeStage | None = None
        if encode is not None:
            if setting.encode_seconds is None:
                raise PlanError(f"pool {encode.name}: the setting has no `encode_seconds`")
            row = setting.model.hidden * setting.quant.base_bytes
            self.stage = EncodeStage(self.encoders, setting.serving, self._item_seconds(encode), row)
        for pool in self.plan.pools:
            cut = pool.parallel
            for rank in pool.ranks:
                # Each data-parallel rank of an engine has a scheduler and a cache of its own.
                group = Lockstep(clock) if cut.dp > 1 else None
                for one in range(cut.dp):
                    self.add(pool.role, rank + one * cut.tp * cut.pp, 0.0, group)

    def add(self, role: Role, rank: int, now: float, group: Lockstep | None = None) -> None:
        """A new engine of a role begins to take work; one of the ranks of `group` where it is one."""
        pool = self.plan.pool(role)
        assert pool is not None
        place = Place(next(self._numbers), rank, pool)
        if role == "encode":
            assert self.stage is not None
            encoder = Encoder(
                role,
                place,
                since=now,
                clock=self.clock,
                max_items=pool.max_items,
                ended=self.stage.ended,
                observer=self.observer if isinstance(self.observer, EncodeObserver) else None,
                cache=TokenCache(self.setting.serving.encode_pool_bytes, self.stage.dropped),
            )
            self.encoders.append(encoder)
            self.every_encoder.append(encoder)
            return
        instance = Instance(role, place, since=now)
        instance.engine = self._engine(instance, pool, group)
        if role == "prefill":
            instance.leases = Leases(self.clock, place.number, partial(self.way.expired, instance))
        else:
            instance.history = PrefixHistory(self.setting.serving.history_tokens)
        self.active[role].append(instance)
        self.ever[role].append(instance)

    def _engine(self, instance: Instance, pool: PoolPlan, group: Lockstep | None) -> Hosted:
        setting, role, way = self.setting, instance.role, self.way
        source: LatencySource = self._sources[role]
        limits = self._limits[role]
        if role == "decode":
            source = LastTokens(source)
        if setting.encode_seconds is not None and self.stage is None:
            source = OwnEncoder(source, self._item_seconds(pool), limits.max_num_batched_tokens)
        kind: type[Hosted] = Receiving if role == "decode" else Hosted
        if role == "prefill" and self.stage is not None and setting.overlaps(pool):
            kind = Overlapping
        engine = kind(
            self.clock,
            source,
            limits,
            partial(way.prefilled if role == "prefill" else way.finished, instance),
            number=instance.place.number,
            waiting=setting.queue() if setting.queue else None,
            observer=self.observer,
            prefill_only=role == "prefill",
            lockstep=group,
        )
        engine.pool, engine.seen = pool, instance.since
        if isinstance(engine, Receiving):
            engine.pull = partial(way.pull, instance)
        return engine

    def _item_seconds(self, pool: PoolPlan) -> Callable[[Item], float]:
        seconds, known = self.setting.encode_seconds, dict[tuple[str, int], float]()
        assert seconds is not None

        def of(item: Item) -> float:
            found = known.get((item.kind, item.tokens))
            if found is None:
                found = known[item.kind, item.tokens] = seconds(pool, item)
            return found

        return of

    def runs(self, end: float) -> dict[Role, PoolRun]:
        """What the pools have counted until `end`."""
        return {
            pool.role: encode_run(self.every_encoder, end)
            if pool.role == "encode"
            else pool_run(self.ever[pool.role], end)
            for pool in self.plan.pools
        }
