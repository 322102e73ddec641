"""The consuming side of the scheduler's half: where each item of each request comes from. It never waits.

A request is let run up to the first item that is still under way. An item whose source is of no use is encoded here,
or its request fails, as the settings say.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from vllm_epd.config import EpdConfig
from vllm_epd.exchange import Load
from vllm_epd.ledger import Item, Ledger, Settled
from vllm_epd.link import SchedulerEnd
from vllm_epd.messages import Drop, Fetch, Fetched
from vllm_epd.sources import OwnView, Source, known_refusal, sound_metadata
from vllm_epd.stats import SuiteECStats
from vllm_suite.compat.fence import encoder_width
from vllm_suite.handoff import Refusal

logger = logging.getLogger("vllm.suite.epd")

# A worker that has not answered this long after the deadline of a fetch is not waited for.
OVERDUE_S = 2.0
# Prompt embeddings travel as a modality of their own, which needs no encoder.
PASSED_THROUGH = "prompt_embeds"


class Consumer:
    """See the module. Called from the engine's thread only.

    Args:
        fields_for: names of the fields that only size a placeholder, by modality.
        stored_here: whether this instance's own pool keeps an item.

    Attributes:
        manager: vLLM's encoder-cache manager, set once it is made.
        spoiled: items that were lost on their way into the runner's cache.
    """

    def __init__(
        self,
        vllm_config: Any,
        config: EpdConfig,
        link: SchedulerEnd,
        view: OwnView,
        stats: SuiteECStats,
        fields_for: Callable[[str], set[str]],
        stored_here: Callable[[str], bool],
    ) -> None:
        self.config = config
        self.manager: Any = None
        self.spoiled: set[str] = set()
        self._vllm_config = vllm_config
        self._link = link
        self._view = view
        self._stats = stats
        self._fields_for = fields_for
        self._stored_here = stored_here
        self._ledger = Ledger(link.ranks)
        self._lookahead = vllm_config.num_prefill_lookahead_tokens
        chunked = vllm_config.scheduler_config.enable_chunked_prefill
        self._overlap = chunked and vllm_config.cache_config.mamba_cache_mode != "align"
        self._widths: dict[str, int] = {}
        self._unavailable: set[str] = set()
        self._failed: set[str] = set()
        self._looked_at: set[str] = set()
        self._holding: set[str] = set()
        self.held = 0
        self._using: dict[str, set[str]] = {}  # identifier -> requests that were given it, for a load that is lost
        self._loads: list[Load] = []

    # --- admission ---

    def admit(self, request: Any, num_computed_tokens: int) -> bool:
        """False while the request cannot compute a token: its next item is under way, or will never come."""
        admitted = self._admit(request, num_computed_tokens)
        if not admitted:
            self._holding.add(request.request_id)
        return admitted

    def end_of_schedule(self) -> None:
        """A step has been made: ``held`` requests are not in it for want of an item."""
        self.held = len(self._holding)
        self._holding.clear()

    def _admit(self, request: Any, num_computed_tokens: int) -> bool:
        request_id = request.request_id
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
        if feature.modality == PASSED_THROUGH or self.manager.holds(identifier):
            return True
        item = self._ledger.get(identifier)
        if item is None:
            if self._ledger.refusal(request_id, identifier) is None:
                self._start(request, index)
            return False
        if request_id not in item.wanted_by and not self._join(request, index, item):
            return False
        return item.ready

    def _join(self, request: Any, index: int, item: Item) -> bool:
        """Wait for an item that another request has asked for; False where this request goes its own way."""
        feature = request.mm_features[index]
        source = self._source(request, index)
        if source is None and item.pending and not item.ready and self._has_media(feature):
            return False  # it may take long, and this request was not told to wait
        if item.rows != request.get_num_encoder_embeds(index):
            self._refuse(request.request_id, feature.identifier, Refusal.WRONG_SHAPE)
            return False
        self._ledger.join(request.request_id, item, source.key if isinstance(source, Source) else "")
        return True

    def _source(self, request: Any, index: int) -> Source | Refusal | None:
        identifier = request.mm_features[index].identifier
        return self._view.source(request.ec_transfer_params, identifier, request.get_num_encoder_embeds(index))

    def _start(self, request: Any, index: int) -> None:
        feature = request.mm_features[index]
        request_id, identifier, rows = request.request_id, feature.identifier, request.get_num_encoder_embeds(index)
        own = self._stored_here(identifier)
        source = None if own else self._source(request, index)
        if isinstance(source, Refusal):
            self._refuse(request_id, identifier, source)
        elif source is not None or own:
            source = source or Source()
            asked = source.wait_s
            wait_s = min(asked, self.config.pending_timeout_s) if asked is not None else 0.0
            until = time.monotonic() + wait_s + self.config.fetch_timeout_s + OVERDUE_S
            key = "" if own else source.key
            item = self._ledger.start(request_id, identifier, key, rows, until, asked is not None)
            self._link.send(
                Fetch(
                    ticket=item.ticket,
                    identifier=identifier,
                    ref=source.ref,
                    pending=source.pending,
                    rows=rows,
                    width=self._width(feature.modality),
                    wait_s=wait_s,
                    fetch_s=self.config.fetch_timeout_s,
                    slices=source.slices,
                )
            )

    def _width(self, modality: str) -> int:
        if modality not in self._widths:
            self._widths[modality] = encoder_width(self._vllm_config, modality)
        return self._widths[modality]

    def _refuse(self, request_id: str, identifier: str, refusal: Refusal) -> None:
        logger.warning("epd: request %s: item %.64r refused: %s", request_id, identifier, refusal)
        self._ledger.refuse(request_id, identifier, refusal)
        self._stats.count("refused", refusal.value)

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
        sizes = self._fields_for(feature.modality)
        return any(value.data is not None for key, value in feature.data.items() if key not in sizes)

    def _fail(self, request_id: str, identifier: str) -> None:
        refusal = self._ledger.refusal(request_id, identifier)
        reason = refusal.value if refusal is not None else "no_reference"
        logger.error("epd: request %s: item %.64r cannot be had: %s", request_id, identifier, reason)
        self._stats.count("failed_items", reason)
        self._failed.add(request_id)
        self._unavailable.add(request_id)

    def give_up(self, request_id: str) -> None:
        """The request brought this half into an error of its own: vLLM shall fail it, and nothing else."""
        self._stats.count("contained_faults", "admission")
        self._failed.add(request_id)
        self._unavailable.add(request_id)

    def under_way(self, request_id: str, identifier: str) -> bool:
        """Whether an attempt for this item has not ended, and this request may wait for it."""
        item = self._ledger.get(identifier)
        return item is not None and request_id in item.wanted_by and not item.ready

    # --- while vLLM makes a step ---

    def may_allocate(self, request: Any, index: int) -> bool:
        """Whether the item can be loaded or encoded in this step; vLLM ends the chunk before it otherwise."""
        feature = request.mm_features[index]
        identifier, request_id = feature.identifier, request.request_id
        if feature.modality == PASSED_THROUGH or self._ledger.ready(identifier):
            return True
        if self.under_way(request_id, identifier):
            self._stats.count("cut_chunks")
            return False
        if request_id in self._failed or not self._has_media(feature):
            return False  # vLLM would end the engine
        refused = self._ledger.refusal(request_id, identifier) is not None
        return not refused or self.config.on_failure == "encode"

    def ready(self, identifier: str) -> bool:
        """Whether the item has been fetched and waits to be loaded."""
        return self._ledger.ready(identifier)

    def allocated(self, request: Any, index: int, encode_only: bool) -> None:
        """vLLM has given the item a place: load it if it was fetched, else it is encoded here in this step."""
        feature = request.mm_features[index]
        identifier, request_id = feature.identifier, request.request_id
        if self._ledger.ready(identifier):
            item = self._ledger.take(identifier)
            self._loads.append(Load(identifier, item.ticket, item.rows, self._width(feature.modality)))
            self._using[identifier] = set(item.wanted_by) | {request_id}
            self._stats.count("loads")
        elif feature.modality != PASSED_THROUGH and not encode_only:
            refusal = self._ledger.refusal(request_id, identifier)
            self._stats.count("local_encodes", refusal.value if refusal is not None else "no_reference")

    def take_loads(self) -> list[Load]:
        """What goes into the runner's cache in this step."""
        loads, self._loads = self._loads, []
        return loads

    # --- ends ---

    def take_unavailable(self) -> set[str]:
        """Requests that vLLM shall fail: an item of theirs will never come."""
        unavailable, self._unavailable = self._unavailable, set()
        return unavailable

    @property
    def failing(self) -> bool:
        """Some request is to be failed by the next step."""
        return bool(self._unavailable)

    def leave(self, request_id: str) -> None:
        """The request is over."""
        if unwanted := self._ledger.leave(request_id):
            self._link.send(Drop(tuple(unwanted)))
        self._failed.discard(request_id)
        self._looked_at.discard(request_id)
        self._unavailable.discard(request_id)
        for identifier in [i for i, users in self._using.items() if request_id in users]:
            self._using[identifier].discard(request_id)
            if not self._using[identifier]:
                del self._using[identifier]

    def fetched(self, rank: int, report: Fetched) -> None:
        """A worker's end of an attempt."""
        why = known_refusal(report.refusal) if report.refusal else None
        said = (report.size, report.seconds, report.producer, report.shares)
        settled = self._ledger.answered(rank, report.ticket, why, *said)
        if settled is not None:
            self._settle(settled)

    def expire(self) -> None:
        """Give up attempts that no worker answers in time, and all where a worker is gone."""
        for settled in self._ledger.fail_all() if self._link.broken else self._ledger.overdue(time.monotonic()):
            self._settle(settled)

    def lost(self, identifier: str) -> None:
        """A worker could not load what was ready; whoever was given it has computed nonsense."""
        self._stats.count("contained_faults", "lost_load")
        self.spoiled.add(identifier)
        self._unavailable |= self._using.pop(identifier, set())

    @property
    def fetching(self) -> bool:
        return self._ledger.fetching

    def next_deadline(self) -> float | None:
        """When the next attempt is given up, by this process's monotonic clock."""
        return self._ledger.next_deadline()

    def _settle(self, settled: Settled) -> None:
        item = settled.item
        if settled.refusal is None:
            self._stats.count("fetches", "ok")
            if item.shares:
                self._stats.count("joined_items")
            for producer, size in (item.shares or {item.producer: item.size}).items():
                self._stats.count("fetch_bytes", producer, size)
            self._stats.observe("fetch_seconds", item.seconds)
            return
        logger.warning("epd: item %.64r refused: %s", item.identifier, settled.refusal)
        self._stats.count("fetches", "failed")
        self._stats.count("refused", settled.refusal.value)
        self._link.send(Drop((item.ticket,)))  # other ranks may have it, or still try
