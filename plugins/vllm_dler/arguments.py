"""What a request says of itself: its ``vllm_xargs``, and what it has in common with others."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

CLASS, GROUP, STOP_AFTER = "dler_class", "dler_group", "dler_stop_after"
OTHER, DEFAULT = "other", "default"

# vLLM names the samples of a request with n > 1 by their number and the request's own id.
_SAMPLE = re.compile(r"[0-9]+_(.+)")
_LONGEST = 128


@dataclass(frozen=True, slots=True)
class Arguments:
    """``vllm_xargs`` that concern the scheduler. ``refused`` are names whose values make no sense; they are ignored."""

    label: str | None = None
    group: str | None = None
    stop_after: int | None = None
    refused: tuple[str, ...] = ()


def read(request: Any) -> Arguments:
    """The arguments of a vLLM `Request`."""
    params = request.sampling_params
    extra = params.extra_args if params is not None else None
    sample = _SAMPLE.fullmatch(request.request_id)
    group = f"n:{sample[1]}" if sample is not None else None
    if not isinstance(extra, Mapping) or not any(name in extra for name in (CLASS, GROUP, STOP_AFTER)):
        return Arguments(group=group)
    refused = []
    names: dict[str, str | None] = {}
    for name in (CLASS, GROUP):
        value = extra.get(name)
        names[name] = str(value) if isinstance(value, str | int) and 0 < len(str(value)) <= _LONGEST else None
        if value is not None and names[name] is None:
            refused.append(name)
    stop_after = extra.get(STOP_AFTER)
    if stop_after is not None and (not isinstance(stop_after, int) or stop_after < 1):
        refused.append(STOP_AFTER)
        stop_after = None
    named = names[GROUP]
    return Arguments(names[CLASS], f"x:{named}" if named else group, stop_after, tuple(refused))


def keys_of(request: Any, arguments: Arguments, prefix_tokens: int, same_prompt: bool) -> tuple[str, ...]:
    """Classes of requests with lengths like this one's, most specific first; see `vllm_suite.lengths`."""
    params = request.sampling_params
    if params is None:
        return ()
    manner = _manner(request, params)
    keys = []
    if same_prompt and request.prompt_token_ids:
        keys.append(f"same:{_digest(request.prompt_token_ids)}|{manner}")
    size = f"prompt:{_bucket(request.num_prompt_tokens)}|{manner}"
    if arguments.label is not None:
        keys += [f"class:{arguments.label}|{size}", f"class:{arguments.label}"]
    if request.session_id:
        keys.append(f"session:{request.session_id}")
    if request.lora_request is not None:
        keys.append(f"lora:{request.lora_request.lora_name}")
    if request.cache_salt:  # tenants have one each, and it is a secret
        keys.append(f"salt:{blake2b(request.cache_salt.encode(), digest_size=8).hexdigest()}")
    prompt = request.prompt_token_ids
    if prompt and 0 < prefix_tokens <= len(prompt):
        keys.append(f"prefix:{_digest(prompt[:prefix_tokens])}|{manner}")
    return (*keys, size)


def _bucket(tokens: int) -> int:
    """Where a third of an octave begins: prompts within 26 % of each other are alike."""
    return round(2 ** (math.floor(3 * math.log2(max(tokens, 1))) / 3))


def _manner(request: Any, params: Any) -> str:
    """How tokens are sampled, as far as it has to do with how many there will be. Never ``max_tokens``: it cuts the
    distribution and is no class."""
    budget = params.thinking_token_budget
    return "".join(
        (
            "greedy" if params.temperature == 0 else "sampled",
            "+structured" if request.structured_output_request is not None else "",
            f"+think{budget.bit_length()}" if isinstance(budget, int) and budget >= 0 else "",
        )
    )


def _digest(tokens: list[int]) -> str:
    return blake2b(array("q", tokens).tobytes(), digest_size=8).hexdigest()
