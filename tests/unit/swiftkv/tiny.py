"""Tiny checkpoints of every SwiftKV family's ordinary form, made offline by transformers itself.

The tensors' names and shapes are therefore those of the library, not of the code under test. Norms and biases
are random too: left at one and zero they would hide a wrong one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from vllm_suite.fleet.tiny_tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, write_tokenizer

# A head size that vLLM's CPU attention knows, and few enough values to convert in a moment.
DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 8,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 2048,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "tie_word_embeddings": False,
}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1},
}


def tiny_checkpoint(
    family: str,
    path: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    std: float = 0.25,
    shard_size: str = "5GB",
    **config: Any,
) -> Path:
    """Write a checkpoint with a tokenizer into `path` and return it.

    `family` is a `base_model_type` of `vllm_swiftkv.families`; `config` overrides fields of its config class.
    `std` is the standard deviation of the weights: 0.25 makes greedy text depend on every token before it.
    """
    fields = DEFAULTS | OF_FAMILY.get(family, {}) | config
    torch_dtype = getattr(torch, dtype)
    # The global generator is left as it was: a test's own seed keeps its meaning.
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **fields))
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            drawn = torch.randn(tensor.shape, generator=generator) * std
            # RMSNorm weights: the only vectors that are no bias.
            tensor.copy_(1 + drawn if tensor.dim() == 1 and not name.endswith(".bias") else drawn)
    model.to(torch_dtype).save_pretrained(path, max_shard_size=shard_size)
    write_tokenizer(path, model_max_length=fields["max_position_embeddings"])
    return path
