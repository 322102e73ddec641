"""Whether a request is prefilled on another instance than the one that decodes it, and on which it may be."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from vllm_suite.router.config import Disaggregation
from vllm_suite.router.job import Job
from vllm_suite.router.members import Member, Pool
from vllm_suite.router.prompt import CHUNK_BYTES_PER_TOKEN

DECODE_ROLES = frozenset({"decode", "any"})
_PREFILL_ROLES = frozenset({"prefill"})
_ANY_ROLE = frozenset({"any"})
_SAME = ("vllm", "kv_connector", "kv")


def whole_reason(job: Job, decode: Member, pool: Pool, settings: Disaggregation) -> str | None:
    """Why `decode` does the prompt itself, as a metric label; None to prefill elsewhere.

    Fills in `job.hashes` where the decision needs them.
    """
    prompt = job.prompt
    if not settings.enabled:
        return "disabled"
    if prompt.whole_reason is not None:
        return prompt.whole_reason
    if job.tokens < settings.min_prompt_tokens:
        return "short"
    if not prefill_members(pool, job, decode, frozenset()):
        return "other_version" if _candidates(pool, job, decode, frozenset()) else "no_prefill"
    if job.hashes is None:
        job.hashes = prompt.chunk_hashes(settings.chunk_tokens)
    if job.hashes:
        chunks = decode.history.matched(job.hashes)
        ids = prompt.token_ids
        size = len(ids) if ids is not None else len(prompt.text) / CHUNK_BYTES_PER_TOKEN
        fraction = min(chunks * settings.chunk_tokens / size, 1.0)
        uncached = job.tokens * (1 - fraction)
        if fraction > settings.max_cached_fraction or uncached < settings.min_prompt_tokens:
            return "cached"
    return None


def prefill_members(pool: Pool, job: Job, decode: Member, excluded: AbstractSet[Member]) -> list[Member]:
    """Members that may prefill for `decode`: dedicated ones, or `any` ones for a dedicated decode.

    Of those, the ones whose KV blocks `decode` can take: while an upgrade goes on, versions are kept apart.
    """
    return [one for one in _candidates(pool, job, decode, excluded) if pairs(one, decode)]


def pairs(one: Member, other: Member) -> bool:
    """Whether blocks of one are of use to the other, as far as both say: vLLM's NIXL handshake asks for the same vLLM,
    and the reference for the same model and layout.
    """
    mine, theirs = one.state.versions, other.state.versions
    return all(mine.get(name) == theirs.get(name) or not (mine.get(name) and theirs.get(name)) for name in _SAME)


def _candidates(pool: Pool, job: Job, decode: Member, excluded: AbstractSet[Member]) -> list[Member]:
    out = excluded | {decode}
    model = job.prompt.model
    found = pool.eligible(_PREFILL_ROLES, model, out)
    if not found and decode.role == "decode":
        found = pool.eligible(_ANY_ROLE, model, out)
    return found
