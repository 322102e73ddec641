"""What a SwiftKV model refuses at start-up, with the reason."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from vllm_swiftkv.families import Family, SwiftKVError

# Drafters that read tokens only. Others read the target's hidden states, of skipped rows too.
_DRAFTERS = ("ngram", "ngram_gpu", "suffix", "draft_model")


def check(vllm_config: Any, family: Family, armed: bool, prefill_only: bool) -> None:
    """Raise SwiftKVError that names everything this configuration cannot do."""
    problems = [*_always(vllm_config, family)]
    if armed:
        problems += [
            f"{problem} (only with the skip: --no-kv-sharing-fast-prefill turns it off)"
            for problem in _armed(vllm_config, family)
        ]
    if prefill_only:
        problems += _prefill_only(vllm_config, armed)
    if problems:
        raise SwiftKVError(f"{family.architecture} cannot run like this: " + "; ".join(problems))


def check_layer(attention: Any, family: Family) -> None:
    """Raise SwiftKVError where vLLM's own head layer attends in a way the tail does not know."""
    if getattr(attention.attn, "sliding_window", None) is not None:
        raise SwiftKVError(f"{family.architecture}: sliding-window attention is not supported")
    if attention.attn.attn_backend.forward_includes_kv_cache_update:
        raise SwiftKVError(
            f"{family.architecture}: attention backend {attention.attn.attn_backend.get_name()} writes its KV cache "
            "inside attention; choose another one with --attention-backend"
        )


def _always(config: Any, family: Family) -> Iterator[str]:
    hf, parallel = config.model_config.hf_config, config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        yield "pipeline parallelism: every later layer needs the output of the cut; use --tensor-parallel-size"
    if parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        yield "decode or prefill context parallelism: late keys and values are written for whole sequences"
    if getattr(hf, "dual_chunk_attention_config", None):
        yield "dual chunk attention"
    if family.moe and parallel.enable_eplb:
        yield "expert load balancing (--enable-eplb)"
    if config.model_config.runner_type == "pooling":
        yield "pooling: it reads hidden states of prompt rows"


def _armed(config: Any, family: Family) -> Iterator[str]:
    speculative, parallel = config.speculative_config, config.parallel_config
    method = speculative.method if speculative is not None else None
    if method is not None and method not in _DRAFTERS:
        yield f"speculative method {method!r} may read hidden states of skipped rows; ngram, suffix, draft models work"
    if family.moe and parallel.data_parallel_size > 1:
        yield "mixture of experts with data parallelism: ranks would disagree on the number of rows"
    if family.moe and config.lora_config is not None:
        yield "LoRA on a mixture of experts: adapters reach into the experts of skipped layers"
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False):
        yield "dual batch overlap"
    if _breakable_graphs():
        yield "VLLM_USE_BREAKABLE_CUDAGRAPH=1: it captures the tail on every row"


def _prefill_only(config: Any, armed: bool) -> Iterator[str]:
    transfer = config.kv_transfer_config
    if not armed:
        yield "prefill_only without --kv-sharing-fast-prefill"
    if transfer is None or not transfer.is_kv_producer:
        yield "prefill_only needs a KV connector that hands the cache on (--kv-transfer-config, role kv_producer)"
    if config.speculative_config is not None:
        yield "prefill_only with speculative decoding: nothing is decoded here"


def _breakable_graphs() -> bool:
    return os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH", "0") == "1"
