"""Which requests a prefill-only instance takes: hand-offs as the router sends them, and nothing a client would read."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from vllm_suite.router.bodies import prefill_body
from vllm_suite.router.prompt import read_prompt
from vllm_swiftkv.prefill_guard import PrefillGuard, reason_to_refuse

HAND_OFF = {"do_remote_decode": True, "do_remote_prefill": False}


def params(transfer: Any = HAND_OFF, **given: Any) -> SamplingParams:
    extra = {"kv_transfer_params": transfer} if transfer is not None else None
    return SamplingParams(**{"max_tokens": 1, "extra_args": extra, **given})


def test_a_hand_off_is_admitted() -> None:
    assert reason_to_refuse(params()) is None
    PrefillGuard.validate_params(params(temperature=0.3, stop=["x"], min_p=0.1, presence_penalty=1.0))


@pytest.mark.parametrize(
    ("refused", "text"),
    [
        (params(None), "do_remote_decode is not true"),
        (params({}), "do_remote_decode is not true"),
        (params({"do_remote_decode": 1}), "do_remote_decode is not true"),
        (params({"do_remote_prefill": True, "do_remote_decode": False}), "do_remote_decode is not true"),
        (params("do_remote_decode"), "do_remote_decode is not true"),
        (params(max_tokens=2), "max_tokens is 2"),
        (params(max_tokens=None), "max_tokens is None"),
        (params(n=2), "n is 2"),
        (params(logprobs=0), "logprobs is given"),
        (params(prompt_logprobs=0), "prompt_logprobs is given"),
        (params(logprob_token_ids=[5]), "logprob_token_ids is given"),
    ],
)
def test_everything_else_is_refused_with_the_remedy(refused: SamplingParams, text: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^(kv_transfer_params\.)?{text}.*send requests to a decode instance or to the router"
    ):
        PrefillGuard.validate_params(refused)


CLIENT: dict[str, Any] = {
    **{"model": "m", "max_tokens": 50, "stream": True, "temperature": 0.5, "logprobs": True, "top_logprobs": 3},
    **{"stream_options": {"include_usage": True}, "n": 2, "min_tokens": 4, "stop": ["x"], "seed": 3},
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("more", [{}, {"tools": [TOOL]}, {"response_format": {"type": "json_object"}}])
def test_what_the_router_sends_to_prefill_is_admitted(more: dict[str, Any]) -> None:
    import msgspec

    chat = CLIENT | {"messages": [{"role": "user", "content": "hello"}], "max_completion_tokens": 50} | more
    body = prefill_body(read_prompt("chat", msgspec.json.encode(chat)))
    request = ChatCompletionRequest.model_validate_json(body)
    assert reason_to_refuse(request.to_sampling_params(request.max_completion_tokens, {})) is None


def test_a_completion_from_the_router_is_admitted() -> None:
    import msgspec

    client = {k: v for k, v in CLIENT.items() if k != "top_logprobs"} | {"prompt": "hello", "logprobs": 2, "best_of": 2}
    body = prefill_body(read_prompt("completions", msgspec.json.encode(client)))
    request = CompletionRequest.model_validate_json(body)
    assert reason_to_refuse(request.to_sampling_params(request.max_tokens, {})) is None


def test_it_leaves_logits_alone_for_both_model_runners() -> None:
    logits = object()
    first, second = PrefillGuard(None, "cpu", False), PrefillGuard(None, "request states")
    assert first.apply(logits) is logits
    assert second.apply(logits, "context") is logits
    assert first.is_argmax_invariant()
    assert second.add_request(0, params()) is False
    first.update_state(None)
