"""The guard of a prefill-only instance: it has no later layers and no LM head, so it must never answer a client.

A logits processor that leaves logits alone. vLLM asks every processor whether a request's parameters are valid before
the request is admitted, and turns a refusal into HTTP status 400.
"""

from __future__ import annotations

from typing import Any

from vllm_suite.compat.processors import LogitsProcessor, LogitsProcessorV2

REMEDY = (
    "this instance only computes prompts for others (SwiftKV prefill_only): send requests to a decode instance or to "
    "the router, or start it without additional_config.suite.swiftkv.prefill_only"
)


def reason_to_refuse(params: Any) -> str | None:
    """Why a request with these `SamplingParams` is no hand-off; None where it is one.

    A hand-off keeps its blocks for a peer and asks for one token, which the peer computes anew. What shapes that token
    (temperature, penalties, a grammar) does no harm, since nobody reads it; log-probabilities would be read.
    """
    transfer = (params.extra_args or {}).get("kv_transfer_params")
    if not isinstance(transfer, dict) or transfer.get("do_remote_decode") is not True:
        return "kv_transfer_params.do_remote_decode is not true"
    if params.max_tokens != 1:
        return f"max_tokens is {params.max_tokens}, not 1"
    if params.n != 1:
        return f"n is {params.n}, not 1"
    for name in ("logprobs", "prompt_logprobs", "logprob_token_ids", "prompt_logprob_token_ids"):
        if getattr(params, name, None) is not None:
            return f"{name} is given"
    return None


class PrefillGuard(LogitsProcessor, LogitsProcessorV2):
    """For both of vLLM's model runners; added to ``--logits-processors`` by the bootstrap."""

    def __init__(self, vllm_config: Any, *args: Any) -> None:
        """``args`` are the device and pinning of the first runner, or the request states of the second."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ValueError for a request that a client would read the answer of."""
        reason = reason_to_refuse(sampling_params)
        if reason is not None:
            raise ValueError(f"{reason}; {REMEDY}")

    def apply(self, logits: Any, *args: Any) -> Any:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False
