"""One request's media: what became of each item, and the documents for the instances that use them."""

from __future__ import annotations

import asyncio
from collections.abc import Container
from typing import Any

import msgspec

from vllm_suite.encoded import ITEM_KEY, PENDING_KEY, SLICES_KEY, Pending, Where
from vllm_suite.router.encode.call import Rejected, Request
from vllm_suite.router.encode.config import Encode, Modality
from vllm_suite.router.encode.flights import Flight
from vllm_suite.router.encode.known import Encoded
from vllm_suite.router.encode.parts import Item
from vllm_suite.router.encode.refusal import BadMedia, MediaRefused
from vllm_suite.router.encode.slots import Slot
from vllm_suite.router.members import Member

_SOON_S = 2.0

_encode = msgspec.json.Encoder().encode


class Plan:
    """The media of one request.

    `document` is the client's with every item rewritten (`Item.raw`); a body for an instance replaces what the
    instance need not get.
    """

    def __init__(
        self,
        settings: Encode,
        document: dict[str, Any],
        items: list[Item],
        embeds: Container[Modality],
        request: Request,
        key: bytes | None,
    ) -> None:
        self._settings = settings
        self._embeds = embeds
        self._key = key
        self.gave_up = False  # an instance could not use our references
        self.overlapped = False  # prefill did not wait for the items
        self.fall_back = settings.fallback == "local"  # an instance that is to use an item may encode it itself
        self._referred: set[Member] = set()
        self.document = document
        self.items = items
        self.request = request
        self.slots: dict[str, Slot] = {}
        for item in items:
            self.slots.setdefault(item.identity, Slot(item))

    def leaves(self) -> list[Slot]:
        """Everything that is looked up or sent."""
        return [leaf for slot in self.slots.values() for leaf in slot.leaves]

    # Bodies

    def document_for(self, member: Member) -> dict[str, Any]:
        """The client's document as `member` gets it: references, and placeholders where they are enough."""
        if self.gave_up or not member.takes_items:
            return self.document
        references: dict[str, dict[str, Any]] = {}
        usable: dict[str, Encoded] = {}
        for identity, slot in self.slots.items():
            encoded = slot.encoded
            if encoded is not None:
                # What an instance encoded itself lies in its own pool: it would be pulled from nowhere.
                if encoded.ref.producer != member.instance_id:
                    usable[identity] = encoded
                    references[encoded.identifier] = {ITEM_KEY: encoded.ref.to_json()}
            elif slot.available or slot.under_way:
                sources = [self._source(leaf, member) for leaf in slot.leaves]
                if all(sources):
                    references[identity] = {SLICES_KEY: sources} if slot.slices else sources[0]
        if not references:
            return self.document
        self._referred.add(member)
        document = dict(self.document)
        document["ec_transfer_params"] = references
        bare = {modality for modality in self._settings.metadata_only if self._may_be_bare(modality, usable)}
        if bare:
            document["messages"] = self._with_placeholders(bare, usable)
        return document

    def body_for(self, member: Member) -> bytes:
        """The same as JSON."""
        return _encode(self.document_for(member))

    def _may_be_bare(self, modality: str, usable: dict[str, Encoded]) -> bool:
        """vLLM takes either media or placeholders for all items of a modality, the latter all with equal fields."""
        items = [item for item in self.items if item.modality == modality]
        if not items or modality in self._embeds or not all(item.identity in usable for item in items):
            return False
        fields = {frozenset(usable[item.identity].metadata) for item in items}
        return len(fields) == 1 and frozenset() not in fields

    def _with_placeholders(self, bare: Container[str], usable: dict[str, Encoded]) -> list[Any]:
        messages = list(self.document["messages"])
        for item in self.items:
            if item.modality not in bare:
                continue
            message = messages[item.message]
            if message is self.document["messages"][item.message]:
                message = messages[item.message] = {**message, "content": list(message["content"])}
            kind = f"{item.modality}_embeds"
            part = {"type": kind, kind: usable[item.identity].metadata, "uuid": item.identity}
            message["content"][item.part] = part
        return messages

    def _source(self, leaf: Slot, member: Member) -> dict[str, Any]:
        """Where a slice or an item is or will be; empty where nobody can be named."""
        if leaf.result is not None:
            return {ITEM_KEY: leaf.result.ref.to_json()}
        assert leaf.flight is not None
        pending = self._pending(leaf.flight, member)
        return {PENDING_KEY: msgspec.to_builtins(pending)} if pending.candidates else {}

    def _pending(self, flight: Flight, member: Member) -> Pending:
        settings = self._settings
        encoders = [one for one in flight.order if one is not member][: 1 + settings.retries]
        candidates = tuple(
            Where(one.instance_id, one.epoch, one.state.ec.host, one.state.ec.port)
            for one in encoders
            if one.state.ec is not None and one.state.ec.host and one.state.ec.port
        )
        wait_s = settings.queue_s + (1 + settings.retries) * settings.call_s
        return Pending(identifier=flight.item.identity, candidates=candidates, wait_s=wait_s).signed(self._key)

    def forget_media(self) -> None:
        """Nothing is sent any more: let go of the bytes, which a long answer would otherwise keep for its time."""
        self.document = {}
        for item in self.items:
            if not self.slots[item.identity].flying:
                item.raw = msgspec.Raw(b"null")

    # What the chain asks

    def prefer(self, members: list[Member]) -> list[Member]:
        """Those that encode nothing of this request themselves, or all where there is no such."""
        makers = {leaf.flight.order[0] for leaf in self.leaves() if leaf.flight is not None}
        return [member for member in members if member not in makers] or members

    def give_up(self, member: Member) -> bool:
        """An instance failed with references of ours: from now on it gets the media. False where it had none.

        Raises `MediaRefused` where nobody may or can encode locally.
        """
        if self.gave_up or member not in self._referred:
            return False
        self.gave_up = True
        if not self.fall_back:
            names = ", ".join(slot.item.name for slot in self.slots.values())
            raise MediaRefused(502, "unavailable", f"an instance could not get or use what was encoded of {names}")
        return True

    def rejection(self) -> MediaRefused | None:
        """An encoder's refusal of one of the items, if there is one by now."""
        for slot in self.slots.values():
            if isinstance(slot.failure, Rejected):
                return slot.item.refused(BadMedia(400, "rejected", str(slot.failure)))
        return None

    async def rejection_soon(self) -> MediaRefused | None:
        """The same, for a request that an instance has refused while encoders still look at its items.

        Both see the same broken picture, and only the encoders' words tell which one it is.
        """
        flying = [leaf.flight.landed for leaf in self.leaves() if leaf.flight is not None]
        flying = [landed for landed in flying if not landed.done()]
        if flying:
            await asyncio.wait(flying, timeout=_SOON_S)
        return self.rejection()
