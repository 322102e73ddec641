"""A worker's half: owns the memory, the item server and the fetches of one rank.

Nothing raises out of it into the runner: that would end the engine. What goes wrong belongs to one item, is counted
and told to the scheduler's half.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vllm_epd.agent import Agent
from vllm_epd.config import EpdConfig
from vllm_epd.exchange import Load, StepPlan
from vllm_epd.item_server import Facts, ItemServer
from vllm_epd.link import WorkerEnd, link_name
from vllm_epd.messages import (
    Counters,
    Drop,
    Evicted,
    Fetch,
    Fetched,
    GaveUp,
    Lost,
    Saved,
    Serving,
    ToScheduler,
    ToWorker,
)
from vllm_epd.peers import Me
from vllm_epd.pool import DTYPES, Pool, Stored
from vllm_epd.puller import Puller
from vllm_epd.scheduler import producer_name
from vllm_epd.sources import usable
from vllm_epd.stats import LEASES, SuiteECStats, count_pool, count_server
from vllm_epd.tiers import new_slab
from vllm_suite.compat.ec import device_of_worker
from vllm_suite.compat.fence import ec_layout_digest, model_digest
from vllm_suite.encoded import Where
from vllm_suite.handoff import Refusal, fleet_key
from vllm_suite.identity import identity
from vllm_suite.loop_thread import LoopThread

logger = logging.getLogger("vllm.suite.epd")

# How often counters of an engine that is otherwise idle are reported. Each report costs it a step, and its workers a
# second of spinning, so what is no news waits for every SLOW_REPORTS-th. The end of the last lease is news: whoever
# drains the instance waits for it.
REPORT_S = 1.0
SLOW_REPORTS = 15
NEWS = frozenset({"served", "pool_hits", "contained_faults"})


class SuiteECWorker:
    """See the module. Called from the runner's thread; the link and the event loop have threads of their own."""

    def __init__(self, vllm_config: Any, config: EpdConfig) -> None:
        transfer, parallel = vllm_config.ec_transfer_config, vllm_config.parallel_config
        self.config = config
        self._rank, index = parallel.rank, parallel.data_parallel_index
        self._device = device_of_worker()
        self._dtype: torch.dtype = vllm_config.model_config.dtype
        self._dedicated = transfer.is_ec_producer and not transfer.is_ec_consumer
        self._plan = StepPlan()
        self._outgoing: list[ToScheduler] = []
        self._announced: set[str] = set()
        self._counting = threading.Lock()  # the loop's thread reports what the runner's thread counts
        self._stats = SuiteECStats()
        self._reported: dict[str, Any] = {}
        self._idle_reports = 0
        self._pool: Pool | None = None
        self._server: ItemServer | None = None
        self._puller: Puller | None = None
        me, key = identity(), fleet_key()
        name = producer_name(vllm_config)
        facts = Facts(name, me.epoch, model_digest(vllm_config), ec_layout_digest(vllm_config))
        self._thread = LoopThread("suite-ec")
        self._agent = Agent(f"ec-{name}-{me.epoch}-{self._rank}", config.progress_delay_us)
        first: list[ToScheduler] = []
        if transfer.is_ec_producer and self._rank == 0:
            # Encoder outputs are equal on all ranks, so one of them keeps and serves them.
            self._pool = self._make_pool(config)
            host, port = config.address(index)
            self._server = ItemServer(self._pool, self._agent, facts, key, host, port, self._thread)
            first.append(Serving(name, me.epoch, host, self._server.port))
            logger.info("epd: instance %s epoch %s serves items at %s:%d", name, me.epoch, host, self._server.port)
        if transfer.is_ec_consumer:
            slab = new_slab(config.receive_bytes, self._device)
            self._agent.register(slab)
            own = None
            if self._pool is not None and self._server is not None:
                own = (self._pool, Where(name, me.epoch, self._server.host, self._server.port))
            dtype = next(text for text, kind in DTYPES.items() if kind == self._dtype)
            consumer = Me(name, key, facts.model, facts.layout)
            self._puller = Puller(config, self._thread, self._agent, slab, dtype, consumer, self._fetched, own)
        self._link = WorkerEnd(link_name(transfer.engine_id, index, self._rank), self._obey, first)
        self._thread.loop.call_soon_threadsafe(self._report_later)

    def _make_pool(self, config: EpdConfig) -> Pool:
        slab = new_slab(config.pool_bytes, self._device)
        self._agent.register(slab)
        host_slab = None
        if config.host_pool_bytes:
            host_slab = new_slab(config.host_pool_bytes, pinned=self._device.type != "cpu")
            self._agent.register(host_slab)
        return Pool(slab, config.block_bytes, config.lease_s, host_slab=host_slab)

    def shutdown(self) -> None:
        self._link.close()
        if self._server is not None:
            self._server.close()
        if self._puller is not None:
            self._puller.close()
        self._thread.stop()
        self._agent.close()

    # --- the link's and the loop's threads ---

    def _obey(self, order: ToWorker) -> None:
        pool, puller = self._pool, self._puller
        match order:
            case Fetch() if puller is not None:
                puller.fetch(order)
            case Drop(tickets=tickets) if puller is not None:
                for ticket in tickets:
                    puller.drop(ticket)
            case GaveUp(identifiers=identifiers) if pool is not None:
                for identifier in identifiers:
                    if not pool.contains(identifier):
                        pool.announce_failure(identifier, Refusal.NOT_STORED)

    def _fetched(self, report: Fetched) -> None:
        self._link.send([report])

    def _report_later(self) -> None:
        """Counters change without steps too: a producer serves while it encodes nothing."""
        self._idle_reports += 1
        if (counters := self._counters(news_only=self._idle_reports % SLOW_REPORTS != 0)) is not None:
            self._link.send([counters])
        self._thread.loop.call_later(REPORT_S, self._report_later)

    def _counters(self, news_only: bool = False) -> Counters | None:
        """What has not been reported yet; None where that is nothing, or with ``news_only`` nothing that matters."""
        with self._counting:
            stats = self._stats
            if self._pool is not None and self._server is not None:
                count_pool(stats, self._pool.take_stats())
                count_server(stats, self._server.take_counts())
            if self._puller is not None:
                for fault, amount in self._puller.take_faults().items():
                    stats.count("contained_faults", fault, amount)
            counts, gauges = stats.data["counts"], stats.data["gauges"]
            freed = _leases(self._reported) > _leases(gauges) == 0
            if not (counts.keys() & NEWS or freed if news_only else counts or gauges != self._reported):
                return None
            self._reported = gauges
            self._stats = SuiteECStats()
            return Counters(counts, gauges)

    def _count(self, series: str, label: str = "") -> None:
        with self._counting:
            self._stats.count(series, label)

    # --- the runner's thread ---

    def bind(self, plan: StepPlan) -> None:
        """This step's plan."""
        self._plan = plan

    def start_save_caches(self, encoder_cache: dict[str, torch.Tensor]) -> None:
        """Lease what requests of this step will refer to, or store it again from the encoder cache."""
        if self._pool is None:
            return
        if self._plan.forget:
            for identifier in self._announced:
                self._pool.drop(identifier)
            self._announced.clear()
        for identifier in self._plan.publish:
            if self._pool.keep(identifier, self.config.lease_s) is not None:
                self._count("reused_items")
            elif (tensor := encoder_cache.get(identifier)) is not None and usable(identifier):
                self._store(identifier, tensor)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], identifier: str) -> None:
        """Store an encoder output that was just made."""
        wanted = self._dedicated or identifier in (self._plan.store or ())
        if self._pool is not None and wanted and usable(identifier):
            self._store(identifier, encoder_cache[identifier])

    def _store(self, identifier: str, tensor: torch.Tensor) -> None:
        assert self._pool is not None
        # The language model would convert it in the same way.
        outcome = self._contained("store", lambda pool: pool.put(identifier, tensor.to(self._dtype)), self._pool)
        if isinstance(outcome, Stored):
            self._announced.add(identifier)
            self._outgoing.append(Saved(identifier, "", outcome.item_id, outcome.rows, outcome.size))
        else:
            refusal = outcome if isinstance(outcome, Refusal) else Refusal.NOT_STORED
            logger.warning("epd: encoder output %.64r is not kept: %s", identifier, refusal)
            self._outgoing.append(Saved(identifier, refusal.value, "", 0, 0))

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor]) -> None:
        """Put this step's items into the encoder cache."""
        for load in self._plan.loads:
            tensor = self._contained("load", self._take, load)
            if tensor is None:
                # The runner must find something; the scheduler's half fails who would use it.
                logger.error("epd: item %.64r was ready and cannot be loaded", load.identifier)
                self._outgoing.append(Lost(load.identifier))
                nothing = torch.zeros(1, 1, dtype=self._dtype, device=self._device)
                tensor = nothing.expand(load.rows, load.width)  # takes no memory, which may be what lacks
            encoder_cache[load.identifier] = tensor

    def _take(self, load: Load) -> torch.Tensor | None:
        assert self._puller is not None
        return self._puller.take(load.ticket)

    def end_of_step(self) -> None:
        """Tell the scheduler's half what this step did, before the step's output leaves the worker."""
        self._contained("end_of_step", self._tell, None)
        self._plan = StepPlan()

    def _tell(self, _: None) -> None:
        if self._pool is not None and any(isinstance(message, Saved) for message in self._outgoing):
            gone = tuple(identifier for identifier in self._announced if not self._pool.contains(identifier))
            if gone:
                self._announced.difference_update(gone)
                self._outgoing.append(Evicted(gone))
        outgoing, self._outgoing = self._outgoing, []
        if (outgoing or self._stats.data["counts"]) and (counters := self._counters()) is not None:
            outgoing.append(counters)
        self._link.send(outgoing)

    def _contained(self, what: str, action: Callable[[Any], Any], argument: Any) -> Any:
        begun = time.monotonic()
        try:
            return action(argument)
        except Exception:
            logger.exception("epd: %s failed after %.3f s", what, time.monotonic() - begun)
            self._count("contained_faults", what)
            return None


def _leases(gauges: Mapping[str, Mapping[str, float]]) -> float:
    return gauges.get(LEASES, {}).get("", 0.0)
