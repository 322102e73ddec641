"""The consuming side of the scheduler's half: what a request may compute while its items come. It never waits.

A request is let run up to the first item that is still under way. An item whose source is of no use is encoded here,
or its request fails, as the settings say.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm_epd.exchange import Load
from vllm_epd.fetches import Fetches
from vllm_epd.messages import Drop
from vllm_epd.sources import sound_metadata
from vllm_suite.handoff import Refusal

logger = logging.getLogger("vllm.suite.epd")

# Prompt embeddings travel as a modality of their own, which needs no encoder.
PASSED_THROUGH = "prompt_embeds"


class Consumer(Fetches):
    """See the module. Called from the engine's thread only. The arguments are those of `Fetches`.

    Attributes:
        manager: vLLM's encoder-cache manager, set once it is made.
        spoiled: items that were lost on their way into the runner's cache.
    """

    def __init__(self, vllm_config: Any, *args: Any) -> None:
        super().__init__(vllm_config, *args)
        self.manager: Any = None
        self.spoiled: set[str] = set()
        self._lookahead = vllm_config.num_prefill_lookahead_tokens
        chunked = vllm_config.scheduler_config.enable_chunked_prefill
        self._overlap = chunked and vllm_config.cache_config.mamba_cache_mode != "align"
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
        here = feature.modality == PASSED_THROUGH or self.manager.holds(feature.identifier)
        return here or self._fetched_for(request, index)

    def _refused_for_good(self, request: Any, feature: Any) -> bool:
        """Nothing is under way for the item, and it is not to be encoded here either."""
        if self.under_way(request.request_id, feature.identifier):
            return False
        refused = self._ledger.refusal(request.request_id, feature.identifier) is not None
        return not self._has_media(feature) or (refused and self.config.on_failure == "fail")

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

    def lost(self, identifier: str) -> None:
        """A worker could not load what was ready; whoever was given it has computed nonsense."""
        self._stats.count("contained_faults", "lost_load")
        self.spoiled.add(identifier)
        self._unavailable |= self._using.pop(identifier, set())
