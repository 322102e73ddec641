"""The encode stage of a request: its media admitted, looked up, sent to encoders, waited for or not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil

import aiohttp
import msgspec

from vllm_suite.router.config import RouterConfig
from vllm_suite.router.encode.admit import Admission
from vllm_suite.router.encode.call import Rejected, Request
from vllm_suite.router.encode.cost import Costs
from vllm_suite.router.encode.encoded_client import EncodedClient, Keeper, ProbeFailed
from vllm_suite.router.encode.examine import scope_of
from vllm_suite.router.encode.flights import Flights
from vllm_suite.router.encode.known import Encoded, Known
from vllm_suite.router.encode.parts import find_media
from vllm_suite.router.encode.plan import Plan
from vllm_suite.router.encode.refusal import MediaRefused
from vllm_suite.router.encode.slicing import counts
from vllm_suite.router.encode.slots import Slot, all_kept
from vllm_suite.router.errors import StageTimeout, UpstreamFailure
from vllm_suite.router.job import Job
from vllm_suite.router.members import Member, Pool
from vllm_suite.router.membership import Membership
from vllm_suite.router.metrics import Live, RouterMetrics
from vllm_suite.router.prompt import NON_TEXT_PART_TOKENS

_ENCODE_ROLE = frozenset({"encode"})
_ANY_ROLE = frozenset({"any"})
_CHECK_S = 30.0  # decoding and hashing what the limits let through, on a busy machine
_MAX_ODD_MODELS = 1024

_encode = msgspec.json.Encoder().encode


class EncodeStage:
    """One per router; `close` ends it."""

    def __init__(
        self,
        config: RouterConfig,
        pool: Pool,
        membership: Membership,
        session: aiohttp.ClientSession,
        metrics: RouterMetrics,
        live: Live,
        key: bytes | None,
    ) -> None:
        settings = config.encode
        self._settings = settings
        self._trust = config.trust_transfer_params
        self._pool = pool
        self._metrics = metrics
        self._live = live
        self._key = key
        self._costs = Costs()
        self._known = Known(settings.known_items, pool)
        self._client = EncodedClient(key)
        self._admission = Admission(settings, metrics)
        self._flights = Flights(settings, session, membership, metrics, self._costs, self._known, key)
        # Models whose engines name items otherwise than we do, although the request has no processor options.
        self._odd_models: set[str | None] = set()

    async def close(self) -> None:
        """Cut off what is under way."""
        await self._flights.close()
        await self._admission.close()
        self._client.close()

    async def admit(self, job: Job) -> None:
        """Check a request's media and give `job` its plan. Raises `MediaRefused` and `StageTimeout`."""
        prompt, settings = job.prompt, self._settings
        document = prompt.document
        if document is None or not settings.enabled:
            return
        if self._trust and document.get("ec_transfer_params"):
            return  # the router in front has been through this
        began = time.perf_counter()
        found = find_media(document, settings.max_items)
        if found.count and not prompt.standard:
            raise MediaRefused(400, "not_json", "a request with media must be standard JSON")
        if not found.items:
            if found.embeds:
                prompt.body = _encode(document)  # uuids may have been taken out
            return
        scope = scope_of(document)
        hops = 1 + ceil(len(found.items) / settings.fetch.concurrency) * settings.fetch.timeout_s
        with self._within(job, "media", _CHECK_S + hops):
            await self._admission.admit(document, found.items, scope)
        for item in found.items:
            remembered = self._known.get(item.identity)
            item.tokens = remembered.ref.tokens if remembered else self._costs.estimate(scope.model, item)
        # The parts without items, embeddings, keep the guess that the prompt was read with.
        prompt.extra_tokens = sum(item.tokens for item in found.items)
        prompt.extra_tokens += NON_TEXT_PART_TOKENS * (found.count - len(found.items))
        prompt.body = b""
        request = Request.of(document, job.headers, scope)
        job.media = Plan(settings, document, found.items, found.embeds, request, self._key)
        self._metrics.observe(time.perf_counter() - began, "encode_admission_seconds")

    async def provide(self, job: Job, plan: Plan, consumers: Sequence[Member], decode: Member) -> None:
        """Find or make what the plan needs, and wait for it unless prefill may start meanwhile.

        Raises `MediaRefused` for an item that an encoder refuses or, where the settings want that or no other instance
        has an encoder, that none encodes.
        """
        began = time.perf_counter()
        plan.fall_back = plan.fall_back and any(member.has_encoder for member in (*consumers, decode))
        metrics = self._metrics
        if any(member.takes_items for member in consumers):
            with self._within(job, "encode", self._longest_s()):
                await self._look_up(plan)
                missing = [slot for slot in plan.slots.values() if not all_kept(slot)]
                members = self._encoders(plan.request.scope.model, decode) if missing else []
                if members:
                    self._send(plan, missing, members)
                # Prefill that runs ahead gets the media, which an instance without an encoder refuses.
                if missing and members and all(m.has_encoder for m in consumers) and self._overlaps(plan, missing):
                    plan.overlapped = True
                    metrics.count("encode_requests", "overlapped")
                    return
                await self._wait(missing)
        self._judge(plan)
        mode = "local" if not any(slot.available for slot in plan.slots.values()) else "encoded"
        metrics.count("encode_requests", mode)
        metrics.observe(time.perf_counter() - began, "encode_request_seconds")

    def finish(self, plan: Plan) -> None:
        """The request has ended: count its items, give up what is still under way."""
        for item in plan.items:
            outcome = self._outcome(plan.slots[item.identity], plan.fall_back)
            self._metrics.count("encode_items", item.modality, outcome)
        for slot in plan.slots.values():
            failure = slot.failure
            if plan.overlapped and isinstance(failure, UpstreamFailure):
                self._metrics.recovered("encode_local", failure.kind)
            if plan.gave_up:
                self._known.drop(slot.item.identity)
            named_otherwise = slot.encoded is not None and slot.encoded.identifier != slot.item.identity
            if named_otherwise or (isinstance(failure, UpstreamFailure) and failure.kind == "not_sliced"):
                self._note_odd(plan)
            for leaf in slot.slices:
                self._metrics.count("encode_slices", leaf.item.modality, leaf.outcome or "failed")
        for leaf in plan.leaves():
            if plan.gave_up:
                self._known.drop(leaf.item.identity)
            if leaf.flight is not None:
                self._flights.leave(leaf.flight)
        self._live.known_items = len(self._known)

    @contextmanager
    def _within(self, job: Job, stage: str, seconds: float) -> Iterator[None]:
        try:
            with job.guard.within(stage, seconds):
                yield
        except StageTimeout as exc:
            self._metrics.count("timeouts", exc.stage)
            raise

    def _longest_s(self) -> float:
        settings = self._settings
        # Twice, for calls that are split after a refusal, and some to spare: the stage ends by its own deadlines.
        return settings.probe_s + 2 * (1 + settings.retries) * (settings.queue_s + settings.call_s) + 5.0

    def _encoders(self, model: str | None, decode: Member) -> list[Member]:
        """Members that may encode for a request that decodes on `decode`."""
        found = self._pool.eligible(_ENCODE_ROLE, model)
        if not found and self._settings.any_encodes:
            found = [member for member in self._pool.eligible(_ANY_ROLE, model, {decode}) if member.makes_items]
        return found

    def _send(self, plan: Plan, missing: Sequence[Slot], members: Sequence[Member]) -> None:
        """Book what is missing, large items in slices."""
        whole = [slot for slot in missing if not slot.slices and not self._flights.under_way(slot.item.identity)]
        if not self._named_otherwise(plan):
            sizes = counts([slot.item for slot in whole], members, self._settings.slices)
            for slot, count in zip(whole, sizes, strict=True):
                if count > 1:
                    slot.cut(count)
                    self._known.put_sliced(slot.item.identity, count)
        leaves = [leaf for slot in missing for leaf in slot.leaves if leaf.kept is None]
        flights = self._flights.book(plan.request, [leaf.item for leaf in leaves], members)
        for leaf, flight in zip(leaves, flights, strict=True):
            leaf.flight = flight

    async def _look_up(self, plan: Plan) -> None:
        """Ask the producers of remembered items, side by side, whether they still keep them."""
        asked: dict[Keeper, list[Slot]] = {}
        remembered: dict[str, Encoded] = {}
        for identity, slot in plan.slots.items():
            if self._known.get(identity) is None and (count := self._known.slices(identity)):
                slot.cut(count)
            for leaf in slot.leaves:
                encoded = self._known.get(leaf.item.identity)
                if encoded is not None:
                    remembered[leaf.item.identity] = encoded
                    ref = encoded.ref
                    producer = Keeper(ref.producer, ref.epoch, ref.claim_host, ref.claim_port)
                    asked.setdefault(producer, []).append(leaf)
        if asked:
            await asyncio.gather(*(self._ask(producer, slots, remembered) for producer, slots in asked.items()))
        for slot in plan.slots.values():
            used = [leaf for leaf in slot.slices if leaf.kept or self._flights.under_way(leaf.item.identity)]
            if not used:
                slot.slices = []  # nothing of it is left: it may be cut otherwise now

    async def _ask(self, producer: Keeper, slots: list[Slot], remembered: dict[str, Encoded]) -> None:
        settings, metrics = self._settings, self._metrics
        names = [remembered[slot.item.identity].identifier for slot in slots]
        try:
            refs = await self._client.kept(producer, names, settings.probe_hold_s, settings.probe_s)
        except ProbeFailed as exc:
            metrics.count("encode_probes", exc.reason)
            return
        metrics.count("encode_probes", "answered")
        for slot, name in zip(slots, names, strict=True):
            ref = refs.get(name)
            if ref is None:
                self._known.drop(slot.item.identity)
                continue
            slot.kept = remembered[slot.item.identity]._replace(ref=ref)
            self._known.put(slot.item.identity, slot.kept)

    def _overlaps(self, plan: Plan, missing: Sequence[Slot]) -> bool:
        settings = self._settings
        if settings.overlap == "never" or (settings.overlap == "auto" and not plan.fall_back):
            return False
        # The engine waits for an item by its identifier, so that must be known before the encoder has answered.
        if self._named_otherwise(plan):
            return False
        return settings.overlap == "always" or len(missing) > 1

    def _named_otherwise(self, plan: Plan) -> bool:
        """Whether engines make identifiers of their own from the names that we give."""
        return plan.request.scope.factors or plan.request.scope.model in self._odd_models

    def _note_odd(self, plan: Plan) -> None:
        if not plan.request.scope.factors and len(self._odd_models) < _MAX_ODD_MODELS:
            self._odd_models.add(plan.request.scope.model)

    async def _wait(self, slots: Sequence[Slot]) -> None:
        landing = [leaf.flight.landed for slot in slots for leaf in slot.leaves if leaf.flight is not None]
        if landing:
            await asyncio.wait(landing)

    def _judge(self, plan: Plan) -> None:
        """What is to be done about items that no encoder gave."""
        rejection = plan.rejection()
        if rejection is not None:
            raise rejection
        for slot in plan.slots.values():
            if slot.available:
                continue
            failure = slot.failure
            sent = any(leaf.flight is not None for leaf in slot.leaves)
            if not isinstance(failure, UpstreamFailure):
                failure = UpstreamFailure("no_encoder", "no encode instance is ready", status=503)
            if not plan.fall_back:
                why = f"{slot.item.name}: {failure}"
                raise MediaRefused(failure.status, "unencoded", why, slot.item.where)
            if sent or any(member.role == "encode" for member in self._pool.members):
                self._metrics.recovered("encode_local", failure.kind)

    def _outcome(self, slot: Slot, fall_back: bool) -> str:
        """The label of what became of an item: kept, encoded, local, failed, or left under way."""
        if all_kept(slot):
            return "kept"
        if slot.available:
            return "encoded"
        if slot.flying:
            return "left"
        refused = isinstance(slot.failure, Rejected)
        return "local" if fall_back and not refused else "failed"
