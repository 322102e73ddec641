"""Scheduler's half of the connector: what vLLM's scheduler asks, and what workers tell. It never waits.

An instance may consume, produce or both; the direction is the request's.
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Callable
from typing import Any

from vllm_epd.config import ConfigError, EpdConfig
from vllm_epd.consumer import Consumer
from vllm_epd.cuts import Cuts
from vllm_epd.exchange import StepPlan
from vllm_epd.link import SchedulerEnd, link_name
from vllm_epd.messages import Counters, Evicted, Fetched, GaveUp, Lost, Saved, Serving
from vllm_epd.publisher import Publisher
from vllm_epd.sources import OwnView
from vllm_epd.stats import SuiteECStats
from vllm_suite.compat.ec import PlaceholderMetadataResolver, aborted
from vllm_suite.encoded import Producer
from vllm_suite.handoff import fleet_key
from vllm_suite.identity import identity

logger = logging.getLogger("vllm.suite.epd")

MANAGER = "vllm_epd.manager.SuiteEncoderCacheManager"
# Given up per step while a worker in this very process may have something to say; see vLLM's in-process executor.
LINK_YIELD_S = 0.0001
# Sleep of an engine that waits for items while other requests wait for something else.
OTHERS_IDLE_S = 0.02

_halves: weakref.WeakValueDictionary[tuple[str, int], SuiteECScheduler] = weakref.WeakValueDictionary()


def half_of(vllm_config: Any) -> SuiteECScheduler | None:
    """The scheduler's half that was built for this configuration in this process."""
    transfer = vllm_config.ec_transfer_config
    if transfer is None:
        return None
    return _halves.get((transfer.engine_id, vllm_config.parallel_config.data_parallel_index))


def producer_name(vllm_config: Any) -> str:
    """What this engine calls itself towards others."""
    index = vllm_config.parallel_config.data_parallel_index
    me = identity().instance_id
    return me if index == 0 else f"{me}/{index}"


class SuiteECScheduler:
    """See the module. One per engine; called from the engine's thread only.

    Attributes:
        consumer, publisher: the directions that the role has.
    """

    def __init__(self, vllm_config: Any, config: EpdConfig) -> None:
        transfer, parallel = vllm_config.ec_transfer_config, vllm_config.parallel_config
        if transfer.is_ec_consumer and vllm_config.ec_manager_config.encoder_cache_manager_cls != MANAGER:
            raise ConfigError(
                "SuiteECConnector: a consumer needs --ec-manager-config "
                f'\'{{"encoder_cache_manager_cls": "{MANAGER}"}}\''
            )
        self.stats = SuiteECStats()
        self._vllm_config = vllm_config
        self._manager: Any = None
        key = fleet_key()
        self._view = OwnView(vllm_config, key)
        index = parallel.data_parallel_index
        self._link = SchedulerEnd([link_name(transfer.engine_id, index, r) for r in range(parallel.world_size)])
        resolver = PlaceholderMetadataResolver(vllm_config.model_config)
        self.publisher: Publisher | None = None
        self.consumer: Consumer | None = None
        if transfer.is_ec_producer:
            # An instance that also computes prompts would read a whole item where only a slice of it lies.
            alone = not transfer.is_ec_consumer
            cuts = Cuts(vllm_config.model_config, self.stats, self._link.send) if alone else None
            self.publisher = Publisher(config, resolver, key, alone, cuts)
        if transfer.is_ec_consumer:
            stored_here = self.publisher.kept if self.publisher is not None else _nothing
            self.consumer = Consumer(
                vllm_config, config, self._link, self._view, self.stats, resolver.fields_for, stored_here
            )
        self._received = False
        _halves[transfer.engine_id, index] = self

    def shutdown(self) -> None:
        self._link.close()

    # --- vLLM's encoder-cache manager ---

    def use_manager(self, manager: Any) -> None:
        """Take the manager, which vLLM makes after the connector."""
        self._manager = manager
        if self.consumer is not None:
            self.consumer.manager = manager

    def may_allocate(self, request: Any, index: int) -> bool:
        """Whether the item can be loaded or encoded in this step."""
        return self.consumer is None or self.consumer.may_allocate(request, index)

    def keeps(self, identifier: str) -> bool:
        """Whether an entry of the manager's book stands for an item that this engine has."""
        spoiled = self.consumer is not None and identifier in self.consumer.spoiled
        return not spoiled and (self.publisher is None or self.publisher.backs(identifier))

    def forgotten(self, identifier: str) -> None:
        """The manager has dropped an entry that stood for nothing."""
        if self.consumer is not None:
            self.consumer.spoiled.discard(identifier)
        if self.publisher is not None:
            self.publisher.forgotten(identifier)

    def forget_all(self) -> None:
        """What is stored here was made with other weights."""
        if self.publisher is not None:
            self.publisher.forget_all()

    # --- vLLM's scheduler ---

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        """False while the request cannot compute a token for want of an item."""
        if not self._received:  # once a step: nothing becomes ready in the middle of a step's making
            self._received = True
            self._receive()
        if self.publisher is not None:
            self.publisher.note(request)
        return self.consumer is None or self.consumer.admit(request, num_computed_tokens)

    def give_up(self, request_id: str) -> None:
        """A request brought this half into an error of its own: vLLM shall fail it, and nothing else."""
        self.stats.count("contained_faults", "admission")
        if self.consumer is not None:
            self.consumer.give_up(request_id)

    def has_cache_item(self, identifier: str) -> bool:
        if self.consumer is not None:
            return self.consumer.ready(identifier)
        # vLLM's own manager would not forget the item when the pool does.
        return self._manager is not None and self.publisher is not None and self.publisher.kept(identifier)

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        publisher = self.publisher
        if self.consumer is not None:
            encode_only = publisher is not None and publisher.encodes_only(request.request_id)
            self.consumer.allocated(request, index, encode_only)
        elif publisher is not None and self._manager is not None:
            publisher.allocated(request.mm_features[index].identifier)

    def build_connector_meta(self, scheduler_output: Any) -> StepPlan:
        self._received = False
        plan = StepPlan()
        if self.consumer is not None:
            if self.consumer.fetching:
                time.sleep(LINK_YIELD_S)
            self.consumer.end_of_schedule()
            plan.loads = self.consumer.take_loads()
        if self.publisher is not None:
            try:
                self.publisher.add_to(plan, scheduler_output)
            except Exception:
                # Requests of this step may go without references; an error here would end the engine.
                logger.exception("epd: what to store in this step could not be told")
                self.stats.count("contained_faults", "publish")
        return plan

    def take_unavailable_requests(self) -> set[str]:
        self._receive()
        return self.consumer.take_unavailable() if self.consumer is not None else set()

    def request_finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        self._receive()
        if self.consumer is not None:
            self.consumer.leave(request.request_id)
        publisher = self.publisher
        if publisher is None or not publisher.leave(request):
            return False, None
        if aborted(request):
            self._link.send(GaveUp(publisher.missing(request)))
            return False, None
        return False, publisher.references(request)

    # --- workers ---

    def _receive(self) -> None:
        for rank, message in self._link.receive():
            if isinstance(message, Counters):
                self.stats.add(message.counts, message.gauges)
            if self.consumer is not None:
                match message:
                    case Fetched():
                        self.consumer.fetched(rank, message)
                    case Lost(identifier=identifier):
                        self.consumer.lost(identifier)
            if self.publisher is not None:
                match message:
                    case Saved():
                        self.publisher.saved(message)
                    case Evicted(identifiers=identifiers):
                        self.publisher.evicted(identifiers)
                    case Serving(producer=name, epoch=epoch, host=host, port=port):
                        view = self._view
                        self.publisher.producer = Producer(name, epoch, view.model, view.layout, host, port)
        if self.consumer is not None:
            self.consumer.expire()

    # --- stats and idling ---

    def take_stats(self) -> SuiteECStats | None:
        """What happened since the last call, or None."""
        self._receive()
        return None if self.stats.is_empty() else self.stats.clone_and_reset()

    def has_news(self) -> bool:
        """A worker has said something that only a step will bring to where it belongs."""
        return self._link.arrived()

    def set_wake(self, wake: Callable[[], None]) -> None:
        self._link.set_wake(wake)

    def held_requests(self) -> int:
        """Requests that the last step did not schedule for want of an item."""
        return self.consumer.held if self.consumer is not None else 0

    def idle_wait_s(self, unfinished: bool) -> float:
        """See :class:`vllm_suite.compat.engine_idle.IdleAware`. Called when a step had nothing to execute.

        A worker spins for a second after each step, so an engine that waits for items makes none.
        """
        if self._link.arrived() or (self.consumer is not None and self.consumer.failing):
            return 0.0
        deadline = self.consumer.next_deadline() if self.consumer is not None else None
        if unfinished and self._vllm_config.kv_transfer_config is None:
            # Nobody knows what they wait for. With a KV connector it is that one's to say.
            return 0.0 if deadline is None else OTHERS_IDLE_S
        return math.inf if deadline is None else max(deadline - time.monotonic(), 0.001)


def _nothing(_: str) -> bool:
    return False
