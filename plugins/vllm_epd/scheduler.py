"""Scheduler's half: decides for each item of each request where it comes from, and never waits.

As a consumer it lets a request run up to the first item that is still under way. As a producer it answers finished
requests with references to what the pool keeps. An instance may be both; the direction is the request's.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from typing import Any

from vllm_epd.config import ConfigError, EpdConfig
from vllm_epd.exchange import Load, StepPlan
from vllm_epd.ledger import Ledger, Settled
from vllm_epd.link import Counters, Drop, Evicted, Fetch, Fetched, Lost, Saved, SchedulerEnd, Serving, link_name
from vllm_epd.sources import OwnView, Source, sound_metadata
from vllm_epd.stats import SuiteECStats
from vllm_suite.compat.ec import PlaceholderMetadataResolver, aborted, collect_ec_item_metadata
from vllm_suite.compat.fence import encoder_width
from vllm_suite.encoded import ERROR_KEY, ITEM_KEY, Producer
from vllm_suite.handoff import Refusal, fleet_key
from vllm_suite.identity import identity

logger = logging.getLogger("vllm.suite.epd")

ENCODE_ONLY_KEY = "suite_encode_only"
MANAGER = "vllm_epd.manager.SuiteEncoderCacheManager"
# A worker that has not answered this long after the deadline of a fetch is not waited for.
OVERDUE_S = 2.0
# Given up per step while a worker in this very process may have something to say; see vLLM's in-process executor.
LINK_YIELD_S = 0.0001
# Longest sleep of an engine that waits for items: other things may be waited for as well.
FETCH_IDLE_S = 0.05
MAX_IDLE_S = 10.0
MAX_NOT_STORED = 4096

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
    """See the module. One per engine; called from the engine's thread only."""

    def __init__(self, vllm_config: Any, config: EpdConfig) -> None:
        transfer, parallel = vllm_config.ec_transfer_config, vllm_config.parallel_config
        self.config = config
        self.is_producer, self.is_consumer = transfer.is_ec_producer, transfer.is_ec_consumer
        if self.is_consumer and vllm_config.ec_manager_config.encoder_cache_manager_cls != MANAGER:
            raise ConfigError(
                "SuiteECConnector: a consumer needs --ec-manager-config "
                f'\'{{"encoder_cache_manager_cls": "{MANAGER}"}}\''
            )
        self.stats = SuiteECStats()
        self.manager: Any = None  # vLLM's encoder-cache manager, once it is made
        self._vllm_config = vllm_config
        self._resolver = PlaceholderMetadataResolver(vllm_config.model_config)
        self._key = fleet_key()
        self._view = OwnView(vllm_config, self._key)
        index = parallel.data_parallel_index
        self._link = SchedulerEnd([link_name(transfer.engine_id, index, r) for r in range(parallel.world_size)])
        self._ledger = Ledger(self._link.ranks)
        self._producer: Producer | None = None
        self._lookahead = vllm_config.num_prefill_lookahead_tokens
        chunked = vllm_config.scheduler_config.enable_chunked_prefill
        self._overlap = chunked and vllm_config.cache_config.mamba_cache_mode != "align"
        self._widths: dict[str, int] = {}
        self._kept: dict[str, Saved] = {}
        self._not_stored: dict[str, Refusal] = {}
        self._encode_only: dict[str, tuple[str, ...]] = {}
        self._unloaded: set[str] = set()  # scheduled as stored: in the manager's book, not in the runner's cache
        self._unavailable: set[str] = set()
        self._failed: set[str] = set()
        self._looked_at: set[str] = set()
        self._using: dict[str, set[str]] = {}  # identifier -> requests that were given it, for a load that is lost
        self._loads: list[Load] = []
        self._received = False
        self._idle_steps = 0
        _halves[transfer.engine_id, index] = self

    def shutdown(self) -> None:
        self._link.close()

    # --- admission ---

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        """False while the request cannot compute a token: its next item is under way, or will never come."""
        self._receive_once_a_step()
        request_id = request.request_id
        if self.is_producer:
            self._note_encode_only(request)
        if not self.is_consumer:
            return True
        if request_id in self._failed or not self._sound(request):
            return False
        first = None
        for index, feature in enumerate(request.mm_features):
            place = feature.mm_position
            if place.offset + place.length <= num_computed_tokens or self._have(request, index):
                continue
            if self._refused_for_good(request, feature):
                self._fail(request_id, feature.identifier)
                return False
            if self.under_way(request_id, feature.identifier) and first is None:
                first = place.offset
        if first is None:
            return True
        return bool(self._overlap and first > num_computed_tokens + 1 + 2 * self._lookahead)

    def _sound(self, request: Any) -> bool:
        """Whether the request's numbers may go to a worker; it fails where they may not."""
        if request.request_id in self._looked_at:
            return True
        for feature in request.mm_features:
            if not sound_metadata(feature):
                self._ledger.refuse(request.request_id, feature.identifier, Refusal.MALFORMED)
                self._fail(request.request_id, feature.identifier)
                return False
        self._looked_at.add(request.request_id)
        return True

    def _have(self, request: Any, index: int) -> bool:
        """Whether the item needs nothing from elsewhere now; starts to fetch it where that is to be done."""
        feature = request.mm_features[index]
        identifier, request_id = feature.identifier, request.request_id
        if feature.modality == "prompt_embeds" or self.manager.holds(identifier):
            return True
        item = self._ledger.get(identifier)
        if item is None:
            if self._ledger.refusal(request_id, identifier) is None:
                self._start(request, index)
            return False
        if request_id not in item.wanted_by:
            if item.rows != request.get_num_encoder_embeds(index):
                self._refuse(request_id, identifier, Refusal.WRONG_SHAPE)
                return False
            source = self._source(request, index)
            self._ledger.join(request_id, item, source.key if isinstance(source, Source) else "")
        return item.ready

    def _source(self, request: Any, index: int) -> Source | Refusal | None:
        identifier = request.mm_features[index].identifier
        return self._view.source(request.ec_transfer_params, identifier, request.get_num_encoder_embeds(index))

    def _start(self, request: Any, index: int) -> None:
        feature = request.mm_features[index]
        request_id, identifier, rows = request.request_id, feature.identifier, request.get_num_encoder_embeds(index)
        own = identifier in self._kept
        source = None if own else self._source(request, index)
        if isinstance(source, Refusal):
            self._refuse(request_id, identifier, source)
        elif source is not None or own:
            pending = source.pending if source is not None else None
            wait_s = min(pending.wait_s, self.config.pending_timeout_s) if pending is not None else 0.0
            until = time.monotonic() + wait_s + self.config.fetch_timeout_s + OVERDUE_S
            key = source.key if source is not None else ""
            item = self._ledger.start(request_id, identifier, key, rows, until, pending is not None)
            self._link.send(
                Fetch(
                    ticket=item.ticket,
                    identifier=identifier,
                    ref=source.ref if source is not None else None,
                    pending=pending,
                    rows=rows,
                    width=self._width(feature.modality),
                    wait_s=wait_s,
                    fetch_s=self.config.fetch_timeout_s,
                )
            )

    def _width(self, modality: str) -> int:
        if modality not in self._widths:
            self._widths[modality] = encoder_width(self._vllm_config, modality)
        return self._widths[modality]

    def _refuse(self, request_id: str, identifier: str, refusal: Refusal) -> None:
        logger.warning("epd: request %s: item %.64r refused: %s", request_id, identifier, refusal)
        self._ledger.refuse(request_id, identifier, refusal)
        self.stats.count("refused", refusal.value)

    def _refused_for_good(self, request: Any, feature: Any) -> bool:
        """Nothing is under way for the item, and it is not to be encoded here either."""
        if self.under_way(request.request_id, feature.identifier):
            return False
        refused = self._ledger.refusal(request.request_id, feature.identifier) is not None
        return not self._has_media(feature) or (refused and self.config.on_failure == "fail")

    def _has_media(self, feature: Any) -> bool:
        """Whether the request carries what the encoder needs, not only what sizes the placeholder."""
        if feature.data is None:
            return False
        sizes = self._resolver.fields_for(feature.modality)
        return any(value.data is not None for key, value in feature.data.items() if key not in sizes)

    def _fail(self, request_id: str, identifier: str) -> None:
        refusal = self._ledger.refusal(request_id, identifier)
        reason = refusal.value if refusal is not None else "no_reference"
        logger.error("epd: request %s: item %.64r cannot be had: %s", request_id, identifier, reason)
        self.stats.count("failed_items", reason)
        self._failed.add(request_id)
        self._unavailable.add(request_id)

    def give_up(self, request_id: str) -> None:
        """The request brought this half into an error of its own: vLLM shall fail it, and nothing else."""
        self.stats.count("contained_faults", "admission")
        self._failed.add(request_id)
        self._unavailable.add(request_id)

    def under_way(self, request_id: str, identifier: str) -> bool:
        """Whether an attempt for this item has not ended, and this request may wait for it."""
        item = self._ledger.get(identifier)
        return item is not None and request_id in item.wanted_by and not item.ready

    # --- what vLLM's scheduler and the encoder-cache manager ask while they make a step ---

    def may_allocate(self, request: Any, index: int) -> bool:
        """Whether the item can be loaded or encoded in this step; vLLM ends the chunk before it otherwise."""
        if not self.is_consumer:
            return True
        feature = request.mm_features[index]
        identifier, request_id = feature.identifier, request.request_id
        if feature.modality == "prompt_embeds" or self._ledger.ready(identifier):
            return True
        if self._ledger.get(identifier) is not None:
            if request_id in self._ledger_wanted_by(identifier):
                self.stats.count("cut_chunks")
            return False
        if request_id in self._failed or not self._has_media(feature):
            return False  # vLLM would end the engine
        refused = self._ledger.refusal(request_id, identifier) is not None
        return not refused or self.config.on_failure == "encode"

    def _ledger_wanted_by(self, identifier: str) -> set[str]:
        item = self._ledger.get(identifier)
        return item.wanted_by if item is not None else set()

    def has_cache_item(self, identifier: str) -> bool:
        if self.is_consumer:
            return self._ledger.ready(identifier)
        # vLLM's own manager would not forget the item when the pool does.
        return identifier in self._kept and self.manager is not None

    def keeps(self, identifier: str) -> bool:
        """Whether a producer's entry of the manager's book is still backed by the pool or the runner's cache."""
        return identifier not in self._unloaded or identifier in self._kept

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        feature = request.mm_features[index]
        identifier, request_id = feature.identifier, request.request_id
        if not self.is_consumer:
            if identifier in self._kept:
                self._unloaded.add(identifier)
            else:
                self._unloaded.discard(identifier)
            return
        if self._ledger.ready(identifier):
            item = self._ledger.take(identifier)
            self._loads.append(Load(identifier, item.ticket, item.rows, self._width(feature.modality)))
            self._using[identifier] = set(item.wanted_by) | {request_id}
            self.stats.count("loads")
        elif feature.modality != "prompt_embeds" and request_id not in self._encode_only:
            refusal = self._ledger.refusal(request_id, identifier)
            self.stats.count("local_encodes", refusal.value if refusal is not None else "no_reference")

    def build_connector_meta(self, scheduler_output: Any) -> StepPlan:
        if self._ledger.fetching:
            time.sleep(LINK_YIELD_S)
        self._received = False
        if scheduler_output.total_num_scheduled_tokens:
            self._idle_steps = 0
        plan = StepPlan(loads=self._loads)
        self._loads = []
        if self.is_producer:
            plan.publish = self._to_publish(scheduler_output)
            if self.is_consumer:
                plan.store = self._to_store(scheduler_output)
        return plan

    def _to_publish(self, scheduler_output: Any) -> list[str]:
        publish: dict[str, None] = {}
        for new in scheduler_output.scheduled_new_reqs:
            if not self.is_consumer or new.req_id in self._encode_only:
                publish.update(dict.fromkeys(feature.identifier for feature in new.mm_features))
        return list(publish)

    def _to_store(self, scheduler_output: Any) -> set[str]:
        store: set[str] = set()
        for request_id, indices in scheduler_output.scheduled_encoder_inputs.items():
            if (identifiers := self._encode_only.get(request_id)) is not None:
                store.update(identifiers[index] for index in indices)
        return store

    # --- end of requests ---

    def take_unavailable_requests(self) -> set[str]:
        """Requests that vLLM shall fail: an item of theirs will never come."""
        self._receive()
        unavailable, self._unavailable = self._unavailable, set()
        return unavailable

    def request_finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        request_id = request.request_id
        self._receive()
        if unwanted := self._ledger.leave(request_id):
            self._link.send(Drop(tuple(unwanted)))
        self._failed.discard(request_id)
        self._looked_at.discard(request_id)
        self._unavailable.discard(request_id)
        for identifier in [i for i, users in self._using.items() if request_id in users]:
            self._using[identifier].discard(request_id)
            if not self._using[identifier]:
                del self._using[identifier]
        encoded = self._encode_only.pop(request_id, None) is not None or not self.is_consumer
        if not (self.is_producer and encoded and request.mm_features) or aborted(request):
            return False, None
        return False, self._references(request)

    def _references(self, request: Any) -> dict[str, Any] | None:
        items = collect_ec_item_metadata(request.mm_features, self._resolver)
        for identifier, entry in items.items():
            saved = self._kept.get(identifier)
            if saved is not None and self._producer is not None:
                ref = self._producer.reference(identifier, saved.item_id, saved.rows, self.config.lease_s, self._key)
                entry[ITEM_KEY] = ref.to_json()
            else:
                entry[ERROR_KEY] = self._not_stored.get(identifier, Refusal.NOT_STORED).value
        return items or None

    def _note_encode_only(self, request: Any) -> None:
        params = request.ec_transfer_params
        if isinstance(params, dict) and params.get(ENCODE_ONLY_KEY) is True:
            identifiers = tuple(feature.identifier for feature in request.mm_features)
            self._encode_only.setdefault(request.request_id, identifiers)

    # --- what workers say ---

    def _receive_once_a_step(self) -> None:
        """Nothing becomes ready in the middle of a step's making."""
        if not self._received:
            self._received = True
            self._receive()

    def _receive(self) -> None:
        for rank, message in self._link.receive():
            match message:
                case Fetched(ticket=ticket, refusal=refusal, size=size, seconds=seconds, producer=producer):
                    why = _refusal(refusal) if refusal else None
                    self._settle(self._ledger.answered(rank, ticket, why, size, seconds, producer))
                case Saved(identifier=identifier, refusal=refusal):
                    self._note_saved(identifier, refusal, message)
                case Evicted(identifiers=identifiers):
                    for identifier in identifiers:
                        self._kept.pop(identifier, None)
                case Lost(identifier=identifier):
                    self._lose(identifier)
                case Counters(counts=counts, gauges=gauges):
                    self.stats.add(counts, gauges)
                case Serving(host=host, port=port):
                    name, view = producer_name(self._vllm_config), self._view
                    self._producer = Producer(name, identity().epoch, view.model, view.layout, host, port)
        for settled in self._ledger.overdue(time.monotonic()):
            self._settle(settled)
        if self._link.broken:
            for settled in self._ledger.fail_all():
                self._settle(settled)

    def _settle(self, settled: Settled | None) -> None:
        if settled is None:
            return
        item = settled.item
        if settled.refusal is None:
            self.stats.count("fetches", "ok")
            self.stats.count("fetch_bytes", item.producer, item.size)
            self.stats.observe("fetch_seconds", item.seconds)
            return
        logger.warning("epd: item %.64r refused: %s", item.identifier, settled.refusal)
        self.stats.count("fetches", "failed")
        self.stats.count("refused", settled.refusal.value)
        self._link.send(Drop((item.ticket,)))  # other ranks may have it, or still try

    def _note_saved(self, identifier: str, refusal: str, saved: Saved) -> None:
        if not refusal:
            self._kept[identifier] = saved
            self._not_stored.pop(identifier, None)
            return
        self._kept.pop(identifier, None)
        self._not_stored[identifier] = _refusal(refusal)
        while len(self._not_stored) > MAX_NOT_STORED:
            del self._not_stored[next(iter(self._not_stored))]

    def _lose(self, identifier: str) -> None:
        self.stats.count("contained_faults", "lost_load")
        self._unavailable |= self._using.pop(identifier, set())

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

    def idle_wait_s(self, unfinished: bool) -> float:
        """See :class:`vllm_suite.compat.engine_idle.IdleAware`. Called when a step had nothing to execute."""
        if self._link.arrived() or self._unavailable:
            self._idle_steps = 0
            return 0.0
        if not unfinished:
            return MAX_IDLE_S
        self._idle_steps += 1
        if not self._ledger.fetching or self._idle_steps < 5:
            return 0.0
        deadline = self._ledger.next_deadline()
        assert deadline is not None
        return min(max(deadline - time.monotonic(), 0.001), FETCH_IDLE_S)


def _refusal(value: str) -> Refusal:
    try:
        return Refusal(value)
    except ValueError:
        return Refusal.UNKNOWN
