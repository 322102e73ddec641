"""One request through the pools: choose decode, decide on prefill, prefill, decode, and the ways out of every
failure. Each step that leaves the straight way is counted under `recoveries`.
"""

from __future__ import annotations

import time

import aiohttp
from aiohttp import web

from vllm_suite.router.blame import Blame, Failure, kind_of
from vllm_suite.router.bodies import decode_body, prefill_queue_s
from vllm_suite.router.config import RouterConfig
from vllm_suite.router.decide import DECODE_ROLES, pairs, prefill_members, whole_reason
from vllm_suite.router.encode.refusal import MediaRefused
from vllm_suite.router.encode.stage import EncodeStage
from vllm_suite.router.errors import StageTimeout, UpstreamFailure, error_response
from vllm_suite.router.job import Job
from vllm_suite.router.lengths import OutputLengths
from vllm_suite.router.members import Member, Pool, pick
from vllm_suite.router.membership import Membership
from vllm_suite.router.metrics import Live, RouterMetrics
from vllm_suite.router.policies import Demand, make_policy
from vllm_suite.router.prefill import Prefill
from vllm_suite.router.relay import Opened, open_answer, relay

_REFUSALS = 3
# Failures after which an instance may be ready soon: the same one, or the one that takes its place.
_WAITS = ("connect", "disconnect", "engine_dead", "role")


class Chain:
    """Runs jobs; one per router."""

    def __init__(
        self,
        config: RouterConfig,
        pool: Pool,
        membership: Membership,
        session: aiohttp.ClientSession,
        metrics: RouterMetrics,
        live: Live,
        encode: EncodeStage,
        lengths: OutputLengths | None = None,
    ) -> None:
        self._config = config
        self._pool = pool
        self._session = session
        self._metrics = metrics
        self._live = live
        self._encode = encode
        policies = config.policies
        self._policy = make_policy(policies.decode, policies)
        self._lengths = lengths
        self._blame = Blame(membership, metrics)
        self._prefill = Prefill(config, pool, session, metrics, live, self._blame)
        self._wants_prefix = "prefix_hash" in (policies.prefill, policies.decode)

    async def run(self, job: Job) -> web.StreamResponse:
        """The answer to the client, also where it is an error. Raises `ClientGone` and cancellations only."""
        try:
            if job.prompt.has_media:
                job.stage = "encode"
                with job.trace.stage("media"):
                    await self._encode.admit(job)
                job.lap("encode")
            return await self._through(job)
        except MediaRefused as exc:
            self._metrics.count("rejected", f"media_{exc.reason}")
            retry_after_s = self._config.limits.retry_after_s if exc.status == 503 else None
            return error_response(exc.status, str(exc), param=exc.param, retry_after_s=retry_after_s)
        except StageTimeout as exc:
            return error_response(504, f"the {exc.stage} deadline passed")
        except UpstreamFailure as exc:
            if exc.body:
                return web.Response(status=exc.status, body=exc.body, content_type="application/json")
            retry_after_s = self._config.limits.retry_after_s if exc.status == 503 else None
            return error_response(exc.status, str(exc), retry_after_s=retry_after_s)
        finally:
            if job.media is not None:
                self._encode.finish(job.media)

    async def _through(self, job: Job) -> web.StreamResponse:
        """The stages in order. Raises what `run` turns into answers."""
        prompt, settings = job.prompt, self._config.disaggregation
        job.tokens = prompt.tokens(self._live.bytes_per_token)
        prefix: int | None = None
        if self._wants_prefix and prompt.document is not None:
            job.hashes = prompt.chunk_hashes(settings.chunk_tokens)
            prefix = prompt.prefix_key(job.hashes, settings.chunk_tokens, self._config.policies.prefix_tokens)
        job.demand = Demand(job.tokens, prefix)
        decode = await self._pick_decode(job, set(), wait=True)
        job.lap("queue")
        if decode is None:
            raise UpstreamFailure("no_instance", "no decode instance is ready", status=503)
        reason = whole_reason(job, decode, self._pool, self._config.disaggregation)
        job.path = "direct" if reason else "disaggregated"
        self._metrics.count("decisions", job.path, reason or "prefill")
        if job.media is not None:
            consumers = [decode] if reason else prefill_members(self._pool, job, decode, frozenset())
            with job.trace.stage("encode") as stage:
                stage.into(job.media.request.headers)
                await self._encode.provide(job, job.media, consumers, decode)
            job.lap("encode")
        reference = None if reason else await self._prefill.reference(job, decode)
        if not reason:
            job.lap("prefill")
            if reference:
                job.moved("prefill", "queue", prefill_queue_s(reference))
        return await self._decode(job, decode, reference)

    # Decode

    async def _pick_decode(
        self, job: Job, excluded: set[Member], *, wait: bool, blocks_of: Member | None = None
    ) -> Member | None:
        """One that can decode, where there is a choice one that takes the blocks that another has computed."""
        model, policy = job.prompt.model, self._policy

        def able() -> list[Member]:
            found = self._pool.eligible(DECODE_ROLES, model, excluded)
            return [one for one in found if pairs(blocks_of, one)] or found if blocks_of is not None else found

        member = pick(able(), policy, job.demand)
        if member is not None or not wait:
            return member
        end = time.monotonic() + self._config.limits.wait_for_instance_s
        while member is None and (left_s := end - time.monotonic()) > 0:
            job.guard.enter("wait", left_s + 1.0)
            await self._pool.wait_change(left_s)
            member = pick(able(), policy, job.demand)
        self._metrics.count("waits", "found" if member is not None else "gave_up")
        return member

    async def _decode(self, job: Job, first: Member, reference: bytes | None) -> web.StreamResponse:
        """Answer from decode. Raises the last failure when no attempt gave a first byte."""
        config, metrics = self._config, self._metrics
        job.stage = "decode"
        media = job.media
        lengths, prompt = self._lengths, job.prompt
        keys = lengths.keys(prompt) if lengths is not None else ()
        output_tokens = prompt.output_tokens
        if lengths is not None:
            output_tokens = lengths.expected(prompt, keys, first.state.max_model_len)
        tokens = job.tokens + output_tokens
        excluded: set[Member] = set()
        member: Member | None = first
        if not first.ready:
            member = await self._pick_decode(job, excluded, wait=True, blocks_of=job.prefilled)
        failure: Failure = UpstreamFailure("no_instance", "no decode instance is ready", status=503)
        retries = config.recovery.decode_retries
        failed: Member | None = None
        refusals: list[Member] = []
        while member is not None:
            if reference is not None and job.prefilled is not None and not pairs(job.prefilled, member):
                # Amid an upgrade the only one left is of another version: it computes the prompt itself.
                reference = None
                metrics.recovered("reference_dropped", "other_version", member.instance_id, job.rid)
            metrics.count("picks", "decode", member.instance_id)
            url = member.chat if job.prompt.endpoint == "chat" else member.completions
            own = job.prompt.body if media is None else media.body_for(member)
            body = decode_body(job.prompt, reference, own) if reference else own
            member.charge(tokens)
            answer: Opened | None = None
            try:
                with job.trace.stage("decode", member.instance_id) as span:
                    span.into(job.headers)
                    answer = await open_answer(
                        self._session, url, body, job.headers, job.guard, config, past_role=media is not None
                    )
                    if media is not None and answer.response.status == 400:
                        rejection = await media.rejection_soon()
                        if rejection is not None:
                            raise rejection
                    job.stage = "stream"
                    span.event("first_byte")
                    job.answer = answer
                    answer.instance = member.instance_id
                    job.lap("first_token")
                    body = own = b""
                    job.forget_body()
                    metrics.observe(time.perf_counter() - job.started, "first_byte_seconds", job.path)
                    if job.hashes and answer.response.status == 200:
                        member.history.add(job.hashes)
                    out = await relay(job.request, answer, job.rid, job.guard, config, metrics)
                    if answer.broken:
                        span.failed(answer.broken)
                    return out
            except (UpstreamFailure, StageTimeout) as exc:
                failure, failed = exc, member
                self._blame.failed("decode", member, exc)
            finally:
                member.discharge(tokens)
                if answer is not None:
                    if lengths is not None:
                        lengths.ended(keys, answer)
                    answer.response.close()
            kind = kind_of(failure)
            if kind == "total":
                break
            untouched = kind in ("connect", "role")
            if kind == "role":
                # It changes its role and has begun nothing: no attempt. It gets nothing before it has answered a poll;
                # one that says it is ready and goes on refusing is left alone.
                refusals.append(member)
                if refusals.count(member) >= _REFUSALS:
                    excluded.add(member)
            elif not self._blame.for_want_of_items(job, member, failure):
                if not retries:
                    break
                retries -= 1
                # A lost connection may have been idle too long; the member is asked again once it has answered a
                # poll. Every other failure rules it out for this request.
                if kind != "disconnect":
                    excluded.add(member)
            if reference is not None and not untouched:
                # Decode may have used the reference, and a used one names blocks that may be someone else's.
                reference = None
                metrics.recovered("reference_dropped", kind, failed.instance_id, job.rid)
            blocks_of = job.prefilled if reference is not None else None
            member = await self._pick_decode(job, excluded, wait=kind in _WAITS, blocks_of=blocks_of)
            if member is not None:
                metrics.recovered("decode_retry", kind, failed.instance_id, job.rid)
        metrics.recovered("error", kind_of(failure), failed.instance_id if failed else "", job.rid)
        raise failure
