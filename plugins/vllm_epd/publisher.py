"""The producing side of the scheduler's half: what the pool keeps, and the references that requests get."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm_epd.config import EpdConfig
from vllm_epd.cuts import Cuts
from vllm_epd.exchange import StepPlan
from vllm_epd.messages import Saved
from vllm_epd.sources import known_refusal, usable
from vllm_suite.compat.ec import PlaceholderMetadataResolver, collect_ec_item_metadata
from vllm_suite.encoded import ERROR_KEY, ITEM_KEY, Producer
from vllm_suite.handoff import Refusal

ENCODE_ONLY_KEY = "suite_encode_only"
MAX_NOT_STORED = 4096


class Publisher:
    """See the module. Called from the engine's thread only.

    Args:
        alone: the instance does nothing but encode, so every request is for others. Elsewhere only those are that
            say so.
        cuts: slices of items, where this instance makes any.
    """

    def __init__(
        self,
        config: EpdConfig,
        resolver: PlaceholderMetadataResolver,
        key: bytes | None,
        alone: bool,
        cuts: Cuts | None = None,
    ) -> None:
        self.producer: Producer | None = None
        self._config = config
        self._resolver = resolver
        self._key = key
        self._alone = alone
        self._cuts = cuts
        self._forget = False
        self._kept: dict[str, Saved] = {}
        self._not_stored: dict[str, Refusal] = {}
        self._encode_only: dict[str, tuple[str, ...]] = {}
        self._unloaded: set[str] = set()  # scheduled as stored: in the manager's book, not in the runner's cache

    # --- what the pool keeps ---

    def kept(self, identifier: str) -> bool:
        """Whether the pool has the item, as far as its worker has told."""
        return identifier in self._kept

    def backs(self, identifier: str) -> bool:
        """Whether an entry of the manager's book has an item behind it, in the runner's cache or in the pool."""
        return identifier not in self._unloaded or identifier in self._kept

    def forgotten(self, identifier: str) -> None:
        """The manager has dropped an entry without an item."""
        self._unloaded.discard(identifier)

    def saved(self, message: Saved) -> None:
        """A worker has stored an item, or could not."""
        identifier = message.identifier
        if not message.refusal:
            self._kept[identifier] = message
            self._not_stored.pop(identifier, None)
            return
        self._kept.pop(identifier, None)
        self._not_stored[identifier] = known_refusal(message.refusal)
        while len(self._not_stored) > MAX_NOT_STORED:
            del self._not_stored[next(iter(self._not_stored))]

    def evicted(self, identifiers: Iterable[str]) -> None:
        for identifier in identifiers:
            self._kept.pop(identifier, None)

    def forget_all(self) -> None:
        """Nothing that was stored may be used any more."""
        self._forget = True
        self._kept.clear()
        self._not_stored.clear()
        self._unloaded.clear()

    # --- requests ---

    def note(self, request: Any) -> None:
        """Remember a request that only encodes."""
        params = request.ec_transfer_params
        if request.request_id in self._encode_only:
            return
        if isinstance(params, dict) and params.get(ENCODE_ONLY_KEY) is True:
            if self._cuts is not None:
                self._cuts.apply(request, self.kept)
            identifiers = tuple(feature.identifier for feature in request.mm_features)
            self._encode_only[request.request_id] = identifiers

    def encodes_only(self, request_id: str) -> bool:
        return request_id in self._encode_only

    def allocated(self, identifier: str) -> None:
        """vLLM has given the item a place on an instance that only encodes: what is stored is not encoded again."""
        if identifier in self._kept:
            self._unloaded.add(identifier)
        else:
            self._unloaded.discard(identifier)

    def add_to(self, plan: StepPlan, scheduler_output: Any) -> None:
        """Which items workers store in this step, and which they lease anew."""
        plan.forget, self._forget = self._forget, False
        publish: dict[str, None] = {}
        for new in scheduler_output.scheduled_new_reqs:
            if self._alone or new.req_id in self._encode_only:
                publish.update(dict.fromkeys(feature.identifier for feature in new.mm_features))
        plan.publish = list(publish)
        if not self._alone:
            plan.store = set()
            for request_id, indices in scheduler_output.scheduled_encoder_inputs.items():
                if (identifiers := self._encode_only.get(request_id)) is not None:
                    plan.store.update(identifiers[index] for index in indices)

    def leave(self, request: Any) -> bool:
        """The request is over. Whether it was for others."""
        encoded = self._encode_only.pop(request.request_id, None) is not None
        return bool((self._alone or encoded) and request.mm_features)

    def missing(self, request: Any) -> tuple[str, ...]:
        """What a request that was given up would have encoded."""
        if self._cuts is not None:
            self._cuts.forget(request.request_id)
        identifiers = {feature.identifier for feature in request.mm_features} - self._kept.keys()
        return tuple(sorted(filter(usable, identifiers)))

    def references(self, request: Any) -> dict[str, Any] | None:
        """The answer to a request: each item with a reference, or with the reason why there is none."""
        items = collect_ec_item_metadata(request.mm_features, self._resolver)
        for identifier, entry in items.items():
            saved = self._kept.get(identifier)
            if saved is not None and self.producer is not None:
                lease_s = self._config.lease_s
                ref = self.producer.reference(identifier, saved.item_id, saved.rows, lease_s, self._key)
                entry[ITEM_KEY] = ref.to_json()
            else:
                entry[ERROR_KEY] = self._not_stored.get(identifier, Refusal.NOT_STORED).value
        if self._cuts is not None:
            self._cuts.describe(request.request_id, items)
        return items or None
