"""The scheduler's limits that may change while an engine runs.

They are set between two steps, by a call of vLLM's utility channel. All lie below what the engine was started with: its
buffers, captured graphs and cache were sized for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

METHOD = "suite_role_limits"
_STARTED = "_suite_started_with"


class Answer(TypedDict):
    """`limits` now and as `started`, and the requests in the scheduler. `refused`: why nothing was set."""

    limits: dict[str, int]
    started: dict[str, int]
    unfinished: int
    refused: str | None


def install() -> None:
    """Let API servers set the limits of the engine in this process."""
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, METHOD, answer)


def answer(core: Any, wanted: dict[str, int] | None = None) -> Answer:
    """Set the limits named in `wanted`, the others as at the start; None only reads."""
    scheduler = core.scheduler
    started: dict[str, int] | None = getattr(scheduler, _STARTED, None)
    if started is None:
        started = read(scheduler)
        setattr(scheduler, _STARTED, started)
    refused = None
    if wanted is not None:
        refused = why_not(wanted, started, scheduler)
        if refused is None:
            _write(scheduler, {**started, **wanted})
    return Answer(
        limits=read(scheduler),
        started=started,
        unfinished=scheduler.get_num_unfinished_requests(),
        refused=refused,
    )


def read(scheduler: Any) -> dict[str, int]:
    """The limits, by the names of vLLM's options."""
    return {
        "max_num_batched_tokens": int(scheduler.max_num_scheduled_tokens),
        "max_num_seqs": int(scheduler.max_num_active_reqs),
        "long_prefill_token_threshold": int(scheduler.scheduler_config.long_prefill_token_threshold),
    }


def why_not(wanted: Mapping[str, int], started: Mapping[str, int], scheduler: Any) -> str | None:
    """Why these limits cannot be set; None where they can."""
    for name, value in wanted.items():
        if name not in started:
            return f"{name} cannot change while the engine runs; {', '.join(started)} can"
        least = 0 if name == "long_prefill_token_threshold" else 1
        if type(value) is not int or value < least:
            return f"{name} must be a whole number of at least {least}, not {value!r}"
        if name != "long_prefill_token_threshold" and value > started[name]:
            return f"{name} {value} is more than the {started[name]} that the engine was started with"
    tokens = wanted.get("max_num_batched_tokens", started["max_num_batched_tokens"])
    config = scheduler.scheduler_config
    if tokens < started["max_num_batched_tokens"]:
        if not config.enable_chunked_prefill:
            return "max_num_batched_tokens can be lowered with chunked prefill only: longer prompts would never run"
        if config.disable_chunked_mm_input:
            return "max_num_batched_tokens cannot be lowered with --disable-chunked-mm-input"
    per_request = 1 + scheduler.num_spec_tokens
    seqs = wanted.get("max_num_seqs", started["max_num_seqs"])
    if tokens < seqs * per_request:
        return f"max_num_batched_tokens {tokens} is less than {per_request} for each of {seqs} requests"
    return None


def _write(scheduler: Any, limits: Mapping[str, int]) -> None:
    scheduler.max_num_scheduled_tokens = limits["max_num_batched_tokens"]
    scheduler.max_num_active_reqs = limits["max_num_seqs"]
    scheduler.scheduler_config.long_prefill_token_threshold = limits["long_prefill_token_threshold"]
