"""Models whose KV cache is not one group of full attention: several groups with sliding windows, and MLA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from child import scheduler
from pair import SUITE, Pair
from pd import Spec, engines, prompt
from test_transfer_faults import _raise_once

COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

SLIDING = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 64,
    "hidden_activation": "gelu_pytorch_tanh",
}

MLA = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "moe_intermediate_size": 64,
    "n_routed_experts": 2,
    "first_k_dense_replace": 3,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 1,
}

# Random weights are made by the engine; MLA chooses its own block size on CPU.
NO_CHECKPOINT = {"load_format": "dummy", "skip_tokenizer_init": True}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "sliding window": (SLIDING, {}, 3),
    "MLA": (MLA, {"block_size": None}, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_pulled_kv_is_used_and_a_failed_pull_is_recomputed(name: str, tmp_path: Path) -> None:
    config, options, groups = CASES[name]
    (tmp_path / "config.json").write_text(json.dumps({**COMMON, **config}))
    llm = {**NO_CHECKPOINT, **options}
    specs = [Spec(side, tmp_path, suite=SUITE, llm=llm, blocks=400) for side in ("p", "d")]
    with engines(*specs) as (p, d):
        pair = Pair(p, d)
        for engine in (p, d):
            engine.call(_draw_weights)
        assert d.call(_groups) == groups
        assert d.generate(prompt(300, 1)).tokens != d.generate(prompt(300, 2)).tokens
        for tokens in (5, 100, 300, 900):
            text = prompt(tokens, tokens)
            alone, before = d.generate(text).tokens, pair.pulls("ok")
            assert d.generate(text, p.prefill(text)).tokens == alone
            assert pair.pulls("ok") == before + 1
        assert d.metric("vllm_suite_kv_pull_bytes_total", direction="in") == d.metric("vllm:nixl_bytes_transferred_sum")
        # Upstream reports the blocks of a failed pull, which ends an engine with several groups.
        kv = p.prefill(text)
        d.call(_raise_once, "transfer")
        assert d.generate(text, kv).tokens == alone
        assert pair.pulls("recomputed") == 1
        pair.wait_free()


def _groups(llm: Any) -> int:
    return len(scheduler(llm).kv_cache_config.kv_cache_groups)


def _draw_weights(llm: Any) -> None:
    """Larger than the engine's dummy weights, so that the output depends on the prompt."""
    import torch

    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
