"""The prefill stage of a request: the reference for decode, or the ways out of not getting one."""

from __future__ import annotations

import time

import aiohttp
import msgspec

from vllm_suite.router.blame import Blame, Failure, kind_of
from vllm_suite.router.bodies import prefill_body, read_prefill_answer
from vllm_suite.router.config import RouterConfig
from vllm_suite.router.decide import prefill_members
from vllm_suite.router.errors import StageTimeout, UpstreamFailure
from vllm_suite.router.job import Job
from vllm_suite.router.members import Member, Pool, pick
from vllm_suite.router.metrics import Live, RouterMetrics
from vllm_suite.router.policies import make_policy
from vllm_suite.router.prompt import Prompt
from vllm_suite.router.upstream import CLIENT_ERRORS, failed_answer, read_all, send, translate

_RATIO_WEIGHT = 0.05


class _Rejected(Exception):
    """Prefill refused the request itself (4xx), so another prefill instance would too."""


class Prefill:
    """One per router."""

    def __init__(
        self,
        config: RouterConfig,
        pool: Pool,
        session: aiohttp.ClientSession,
        metrics: RouterMetrics,
        live: Live,
        blame: Blame,
    ) -> None:
        self._config = config
        self._pool = pool
        self._session = session
        self._metrics = metrics
        self._live = live
        self._blame = blame
        self._policy = make_policy(config.policies.prefill, config.policies)

    async def reference(self, job: Job, decode: Member) -> bytes | None:
        """The reference for decode, or None where decode computes by itself. Raises where that is not wanted."""
        metrics, recovery = self._metrics, self._config.recovery
        media = job.media
        body = b"" if media is not None else prefill_body(job.prompt)
        excluded: set[Member] = set()
        failure: Failure = UpstreamFailure("no_instance", "no prefill instance is ready")
        failed = ""
        job.stage = "prefill"
        left, attempt = 1 + recovery.prefill_retries, 0
        while left:
            members = prefill_members(self._pool, job, decode, excluded)
            if media is not None:
                members = media.prefer(members)
            member = pick(members, self._policy, job.demand)
            if member is None:
                break
            if attempt:
                metrics.recovered("prefill_retry", kind_of(failure), failed, job.rid)
            attempt += 1
            metrics.count("picks", "prefill", member.instance_id)
            if media is not None:
                body = prefill_body(job.prompt, media.document_for(member))
            member.charge(job.tokens)
            began = time.perf_counter()
            try:
                with job.trace.stage("prefill", member.instance_id) as span:
                    span.into(job.headers)
                    reference, exact = await self._once(job, member, body)
            except _Rejected:
                rejection = await media.rejection_soon() if media is not None else None
                if rejection is not None:
                    raise rejection from None
                # Decode gets the request as it was sent and words the refusal as vLLM does.
                metrics.recovered("prefill_rejected", "status", member.instance_id, job.rid)
                return None
            except (UpstreamFailure, StageTimeout) as exc:
                failure, failed = exc, member.instance_id
                self._blame.failed("prefill", member, exc)
                if kind_of(exc) == "role":
                    excluded.add(member)  # it has begun nothing, so this was no attempt
                elif not self._blame.for_want_of_items(job, member, exc):
                    left -= 1
                    excluded.add(member)
                continue
            finally:
                member.discharge(job.tokens)
            metrics.observe(time.perf_counter() - began, "prefill_seconds")
            self._learn(job.prompt, exact)
            job.prefilled = member
            if reference is None:
                metrics.recovered("decode_alone", "no_reference", member.instance_id, job.rid)
            elif job.hashes:
                member.history.add(job.hashes)
            return reference
        if recovery.prefill_fallback == "error":
            metrics.recovered("error", kind_of(failure), failed, job.rid)
            raise failure
        metrics.recovered("decode_alone", kind_of(failure), failed, job.rid)
        return None

    async def _once(self, job: Job, member: Member, body: bytes) -> tuple[bytes | None, int]:
        limits = self._config.limits
        job.guard.enter("prefill", self._config.timeouts.prefill_s)
        url = member.chat if job.prompt.endpoint == "chat" else member.completions
        headers = job.headers
        if "Accept-Encoding" in headers:
            headers = headers.copy()
            del headers["Accept-Encoding"]
        response: aiohttp.ClientResponse | None = None
        try:
            response = await send(self._session, url, body, headers, "prefill")
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
            failed = failed_answer(status, answer, "prefill")
            if failed.kind == "status":
                failed = UpstreamFailure("status", "the prefill instance failed", status=502)
            raise failed
        try:
            return read_prefill_answer(answer)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise UpstreamFailure("protocol", "the prefill instance's answer is not JSON") from exc

    def _learn(self, prompt: Prompt, exact_tokens: int) -> None:
        if prompt.token_ids is None and not prompt.extra_tokens and exact_tokens > 0 and prompt.text:
            seen = min(max(len(prompt.text) / exact_tokens, 0.5), 16.0)
            self._live.bytes_per_token += _RATIO_WEIGHT * (seen - self._live.bytes_per_token)
