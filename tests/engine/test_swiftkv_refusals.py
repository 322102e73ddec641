"""What cannot be right is refused before the engine serves, with the reason: on real configurations of vLLM."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import swiftkv_engine as se

Checkpoint = Callable[..., Path]
ONLY_ARMED = "--no-kv-sharing-fast-prefill turns it off"

# Name, family, options, whether it is refused with the skip off too, what the refusal says.
CASES: list[tuple[str, str, dict[str, Any], bool, str]] = [
    (
        "decode context parallel",
        "llama",
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 4},
        True,
        "context",
    ),
    ("pooling", "llama", {"runner": "pooling"}, True, "pooling"),
    ("medusa", "llama", {"speculative_config": {"method": "medusa", "num_speculative_tokens": 2}}, False, "'medusa'"),
    ("hidden states", "llama", {"speculative_config": {"method": "extract_hidden_states"}}, False, "extract_hidden"),
    ("adapters of experts", "qwen3_moe", {"enable_lora": True}, False, "LoRA on a mixture"),
    ("experts with data parallel", "qwen3_moe", {"data_parallel_size": 2}, False, "data parallelism"),
    (
        *("two micro-batches", "llama", {"ubatch_size": 2, "all2all_backend": "deepep_low_latency"}),
        *(False, "dual batch overlap"),
    ),
]
EXTRA = {
    "medusa": lambda model: {"model": str(model)},
    "extract_hidden_states": lambda model: {
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [1]}},
    },
}


def ask(_llm: Any, model: Path, family: str, armed: bool, options: dict[str, Any]) -> tuple[str, str] | None:
    """What the guard says of a real `VllmConfig`: the error's type and text, or None."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_swiftkv.families import of_model_type
    from vllm_swiftkv.models import guards

    args = EngineArgs(str(model), dtype="float32", kv_sharing_fast_prefill=armed, max_model_len=512, **options)
    config = args.create_engine_config()
    try:
        guards.check(config, of_model_type(family), armed, prefill_only=False)
    except ValueError as error:
        return type(error).__name__, str(error)
    return None


@pytest.fixture(scope="module")
def process(checkpoint: Checkpoint) -> Any:
    """A process with vLLM in it; its engine is not used."""
    with se.engine(checkpoint("llama", layers=8, cut=4, group=1)) as engine:
        yield engine


@pytest.mark.parametrize(
    ("family", "options", "always", "said"), [pytest.param(*case[1:], id=case[0]) for case in CASES]
)
def test_refused(
    process: se.Engine, checkpoint: Checkpoint, family: str, options: dict[str, Any], always: bool, said: str
) -> None:
    model = checkpoint(family, layers=8, cut=4, group=1)
    if speculative := options.get("speculative_config"):
        options = {"speculative_config": {**speculative, **EXTRA[speculative["method"]](model)}}
    refusal = process.call(ask, model, family, True, options)
    assert refusal is not None
    assert refusal[0] == "SwiftKVError"
    assert said in refusal[1]
    assert (ONLY_ARMED in refusal[1]) is not always
    unarmed = process.call(ask, model, family, False, options)
    assert (unarmed is not None) is always


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_drafts_from_tokens_are_not_refused(process: se.Engine, checkpoint: Checkpoint, method: str) -> None:
    model = checkpoint("llama", layers=8, cut=4, group=1)
    extra = {"prompt_lookup_max": 2} if method == "ngram" else {"model": str(model)}
    options = {"speculative_config": {"method": method, "num_speculative_tokens": 2, **extra}}
    assert process.call(ask, model, "llama", True, options) is None


def test_pipeline_parallelism_is_refused_by_vllm_itself(process: se.Engine, checkpoint: Checkpoint) -> None:
    with pytest.raises(se.EngineError, match="Pipeline parallelism is not supported") as error:
        process.call(ask, checkpoint("llama", layers=8, cut=4, group=1), "llama", True, {"pipeline_parallel_size": 2})
    assert error.value.kind == "NotImplementedError"


def breakable() -> None:
    os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] = "1"


def test_a_refusal_ends_the_start(checkpoint: Checkpoint) -> None:
    """The error is a ValueError with the reason, raised where the engine is made."""
    error = se.refusal(checkpoint("llama", layers=8, cut=4, group=1), prepare=breakable)
    assert error.kind == "SwiftKVError"
    assert "VLLM_USE_BREAKABLE_CUDAGRAPH" in error.text
    assert ONLY_ARMED in error.text


@pytest.mark.parametrize("armed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_sliding_windows_are_refused(checkpoint: Checkpoint, armed: bool) -> None:
    error = se.refusal(checkpoint("mistral", layers=8, cut=4, group=1, sliding_window=64), armed=armed)
    assert error.kind == "SwiftKVError"
    assert "sliding-window" in error.text
