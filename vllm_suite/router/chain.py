"""One request through the pools: choose decode, decide on prefill, prefill, decode, and the ways out of every
failure. Each step that leaves the straight way is counted under `recoveries`.
"""

from __future__ import annotations

import time

import aiohttp
import msgspec
from aiohttp import web

from vllm_suite.router.bodies import decode_body, prefill_body, read_prefill_answer
from vllm_suite.router.config import RouterConfig
from vllm_suite.router.decide import DECODE_ROLES, prefill_members, whole_reason
from vllm_suite.router.errors import StageTimeout, UpstreamFailure, error_response
from vllm_suite.router.job import Job
from vllm_suite.router.members import Member, Pool, pick
from vllm_suite.router.membership import Membership
from vllm_suite.router.metrics import Live, RouterMetrics
from vllm_suite.router.policies import Demand, make_policy
from vllm_suite.router.prompt import Prompt
from vllm_suite.router.relay import Opened, open_answer, relay
from vllm_suite.router.upstream import CLIENT_ERRORS, read_all, send, translate

_RATIO_WEIGHT = 0.05


class _Rejected(Exception):
    """Prefill refused the request itself (4xx), so another prefill instance would too."""


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
    ) -> None:
        self._config = config
        self._pool = pool
        self._membership = membership
        self._session = session
        self._metrics = metrics
        self._live = live
        policies = config.policies
        self._policies = {
            "prefill": make_policy(policies.prefill, policies),
            "decode": make_policy(policies.decode, policies),
        }
        self._wants_prefix = "prefix_hash" in (policies.prefill, policies.decode)

    async def run(self, job: Job) -> web.StreamResponse:
        """The answer to the client, also where it is an error. Raises `ClientGone` and cancellations only."""
        prompt, settings = job.prompt, self._config.disaggregation
        job.tokens = prompt.tokens(self._live.bytes_per_token)
        prefix: int | None = None
        if self._wants_prefix and prompt.document is not None:
            job.hashes = prompt.chunk_hashes(settings.chunk_tokens)
            prefix = prompt.prefix_key(job.hashes, settings.chunk_tokens, self._config.policies.prefix_tokens)
        job.demand = Demand(job.tokens, prefix)
        try:
            decode = await self._pick_decode(job, set(), wait=True)
            if decode is None:
                raise UpstreamFailure("no_instance", "no decode instance is ready", status=503)
            reason = whole_reason(job, decode, self._pool, self._config.disaggregation)
            job.path = "direct" if reason else "disaggregated"
            self._metrics.count("decisions", job.path, reason or "prefill")
            reference = None if reason else await self._prefill(job, decode)
            return await self._decode(job, decode, reference)
        except StageTimeout as exc:
            return error_response(504, f"the {exc.stage} deadline passed")
        except UpstreamFailure as exc:
            if exc.body is not None:
                return web.Response(status=exc.status, body=exc.body, content_type="application/json")
            retry_after_s = self._config.limits.retry_after_s if exc.status == 503 else None
            return error_response(exc.status, str(exc), retry_after_s=retry_after_s)

    # Prefill

    async def _prefill(self, job: Job, decode: Member) -> bytes | None:
        """The reference for decode, or None where decode computes by itself. Raises where that is not wanted."""
        metrics, recovery = self._metrics, self._config.recovery
        body = prefill_body(job.prompt)
        excluded: set[Member] = set()
        failure: UpstreamFailure | StageTimeout = UpstreamFailure("no_instance", "no prefill instance is ready")
        job.stage = "prefill"
        for attempt in range(1 + recovery.prefill_retries):
            members = prefill_members(self._pool, job, decode, excluded)
            member = pick(members, self._policies["prefill"], job.demand)
            if member is None:
                break
            if attempt:
                metrics.count("recoveries", "prefill_retry", _kind(failure))
            metrics.count("picks", "prefill", member.instance_id)
            member.charge(job.tokens)
            began = time.perf_counter()
            try:
                reference, exact = await self._prefill_once(job, member, body)
            except _Rejected:
                # Decode gets the request as it was sent and words the refusal as vLLM does.
                metrics.count("recoveries", "prefill_rejected", "status")
                return None
            except (UpstreamFailure, StageTimeout) as exc:
                failure = exc
                self._failed("prefill", member, exc)
                excluded.add(member)
                continue
            finally:
                member.discharge(job.tokens)
            metrics.observe(time.perf_counter() - began, "prefill_seconds")
            self._learn(job.prompt, exact)
            if reference is None:
                metrics.count("recoveries", "decode_alone", "no_reference")
            elif job.hashes:
                member.history.add(job.hashes)
            return reference
        if recovery.prefill_fallback == "error":
            metrics.count("recoveries", "error", _kind(failure))
            raise failure
        metrics.count("recoveries", "decode_alone", _kind(failure))
        return None

    async def _prefill_once(self, job: Job, member: Member, body: bytes) -> tuple[bytes | None, int]:
        limits = self._config.limits
        job.guard.enter("prefill", self._config.timeouts.prefill_s)
        url = member.chat if job.prompt.endpoint == "chat" else member.completions
        headers = job.headers
        if "Accept-Encoding" in headers:
            headers = headers.copy()
            del headers["Accept-Encoding"]
        response: aiohttp.ClientResponse | None = None
        try:
            response = await send(self._session, url, body, headers)
            answer = await read_all(response, limits.prefill_answer_bytes)
        except CLIENT_ERRORS as exc:
            failure = translate(exc, job.guard)
            if failure is None:
                raise
            raise failure from exc
        finally:
            if response is not None:
                response.close()
        status = response.status
        if status in (401, 403) and not self._config.auth.forward_authorization:
            raise UpstreamFailure("auth", "the prefill instance refused the router's key")
        if 400 <= status < 500 and status != 429:
            raise _Rejected
        if status != 200:
            raise UpstreamFailure("status", "the prefill instance failed", status=502)
        try:
            return read_prefill_answer(answer)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise UpstreamFailure("protocol", "the prefill instance's answer is not JSON") from exc

    def _learn(self, prompt: Prompt, exact_tokens: int) -> None:
        if prompt.token_ids is None and not prompt.extra_tokens and exact_tokens > 0 and prompt.text:
            seen = min(max(len(prompt.text) / exact_tokens, 0.5), 16.0)
            self._live.bytes_per_token += _RATIO_WEIGHT * (seen - self._live.bytes_per_token)

    # Decode

    async def _pick_decode(self, job: Job, excluded: set[Member], *, wait: bool) -> Member | None:
        model, policy = job.prompt.model, self._policies["decode"]
        member = pick(self._pool.eligible(DECODE_ROLES, model, excluded), policy, job.demand)
        if member is not None or not wait:
            return member
        end = time.monotonic() + self._config.limits.wait_for_instance_s
        while member is None and (left_s := end - time.monotonic()) > 0:
            job.guard.enter("wait", left_s + 1.0)
            await self._pool.wait_change(left_s)
            member = pick(self._pool.eligible(DECODE_ROLES, model, excluded), policy, job.demand)
        self._metrics.count("waits", "found" if member is not None else "gave_up")
        return member

    async def _decode(self, job: Job, first: Member, reference: bytes | None) -> web.StreamResponse:
        """Answer from decode. Raises the last failure when no attempt gave a first byte."""
        config, metrics = self._config, self._metrics
        job.stage = "decode"
        tokens = job.tokens + job.prompt.output_tokens
        excluded: set[Member] = set()
        member: Member | None = first if first.ready else await self._pick_decode(job, excluded, wait=True)
        failure: UpstreamFailure | StageTimeout = UpstreamFailure(
            "no_instance", "no decode instance is ready", status=503
        )
        for attempts_left in range(config.recovery.decode_retries, -1, -1):
            if member is None:
                break
            metrics.count("picks", "decode", member.instance_id)
            url = member.chat if job.prompt.endpoint == "chat" else member.completions
            body = decode_body(job.prompt, reference) if reference else job.prompt.body
            member.charge(tokens)
            answer: Opened | None = None
            try:
                answer = await open_answer(self._session, url, body, job.headers, job.guard, config)
                job.stage = "stream"
                metrics.observe(time.perf_counter() - job.started, "first_byte_seconds", job.path)
                if job.hashes and answer.response.status == 200:
                    member.history.add(job.hashes)
                return await relay(job.request, answer, job.rid, job.guard, config, metrics)
            except (UpstreamFailure, StageTimeout) as exc:
                failure = exc
                self._failed("decode", member, exc)
            finally:
                member.discharge(tokens)
                if answer is not None:
                    answer.response.close()
            kind = _kind(failure)
            if kind == "total" or not attempts_left:
                break
            # A lost connection may have been idle too long; the member is asked again once it has answered a
            # poll. Every other failure rules it out for this request.
            if kind != "disconnect":
                excluded.add(member)
            if reference is not None and kind != "connect":
                # Decode may have used the reference, and a used one names blocks that may be someone else's.
                reference = None
                metrics.count("recoveries", "reference_dropped", kind)
            member = await self._pick_decode(job, excluded, wait=kind in ("connect", "disconnect"))
            if member is not None:
                metrics.count("recoveries", "decode_retry", kind)
        metrics.count("recoveries", "error", _kind(failure))
        raise failure

    def _failed(self, stage: str, member: Member, failure: UpstreamFailure | StageTimeout) -> None:
        kind = _kind(failure)
        self._metrics.count("upstream_errors", stage, kind)
        if isinstance(failure, StageTimeout):
            self._metrics.count("timeouts", failure.stage)
        if kind in ("connect", "disconnect"):
            self._membership.suspect(member)


def _kind(failure: UpstreamFailure | StageTimeout) -> str:
    """The label of a failure; a connection that was never made is `connect`, refused or timed out."""
    return failure.kind if isinstance(failure, UpstreamFailure) else failure.stage
