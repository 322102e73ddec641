"""The fetches of a consumer's items, as the scheduler's half sees them: begun, joined, answered, given up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from vllm_epd.config import EpdConfig
from vllm_epd.ledger import Item, Ledger, Settled
from vllm_epd.link import SchedulerEnd
from vllm_epd.messages import Drop, Fetch, Fetched
from vllm_epd.sources import OwnView, Source, known_refusal
from vllm_epd.stats import SuiteECStats
from vllm_suite.compat.fence import encoder_width
from vllm_suite.handoff import Refusal

logger = logging.getLogger("vllm.suite.epd")

# A worker that has not answered this long after the deadline of a fetch is not waited for.
OVERDUE_S = 2.0


class Fetches:
    """Where each item of each request comes from, and how far it is. Called from the engine's thread only.

    Args:
        fields_for: names of the fields that only size a placeholder, by modality.
        stored_here: whether this instance's own pool keeps an item.
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
        self._vllm_config = vllm_config
        self._link = link
        self._view = view
        self._stats = stats
        self._fields_for = fields_for
        self._stored_here = stored_here
        self._ledger = Ledger(link.ranks)
        self._widths: dict[str, int] = {}

    # --- from whom ---

    def _fetched_for(self, request: Any, index: int) -> bool:
        """Whether the item has been fetched; starts to fetch it where that is to be done."""
        feature = request.mm_features[index]
        identifier, request_id = feature.identifier, request.request_id
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

    def _has_media(self, feature: Any) -> bool:
        """Whether the request carries what the encoder needs, not only what sizes the placeholder."""
        if feature.data is None:
            return False
        sizes = self._fields_for(feature.modality)
        return any(value.data is not None for key, value in feature.data.items() if key not in sizes)

    # --- how far ---

    def under_way(self, request_id: str, identifier: str) -> bool:
        """Whether an attempt for this item has not ended, and this request may wait for it."""
        item = self._ledger.get(identifier)
        return item is not None and request_id in item.wanted_by and not item.ready

    def ready(self, identifier: str) -> bool:
        """Whether the item has been fetched and waits to be loaded."""
        return self._ledger.ready(identifier)

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
