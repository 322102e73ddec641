"""What the SwiftKV model classes take from vLLM: layers, model interfaces, and the fast-prefill machinery."""

from __future__ import annotations

from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tensor_model_parallel_world_size
from vllm.forward_context import ForwardContext, get_forward_context
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.attention.attention import Attention, unified_kv_cache_update
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsQuant
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaMLP
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer, Qwen2MLP
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeMLP, Qwen3MoeSparseMoeBlock
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata, subclass_attention_backend
from vllm.v1.attention.backends.utils import make_kv_sharing_fast_prefill_common_attn_metadata

__all__ = [
    "Attention",
    "AttentionBackend",
    "AutoWeightsLoader",
    "BaseLayerWithLoRA",
    "ColumnParallelLinear",
    "CommonAttentionMetadata",
    "ForwardContext",
    "LlamaDecoderLayer",
    "LlamaMLP",
    "LogitsProcessor",
    "MergedColumnParallelLinear",
    "ParallelLMHead",
    "Qwen2DecoderLayer",
    "Qwen2MLP",
    "Qwen3DecoderLayer",
    "Qwen3MoeDecoderLayer",
    "Qwen3MoeMLP",
    "Qwen3MoeSparseMoeBlock",
    "RMSNorm",
    "RowParallelLinear",
    "SupportsLoRA",
    "SupportsQuant",
    "VllmConfig",
    "VocabParallelEmbedding",
    "WeightsMapper",
    "get_forward_context",
    "get_tensor_model_parallel_world_size",
    "make_kv_sharing_fast_prefill_common_attn_metadata",
    "set_model_tag",
    "subclass_attention_backend",
    "support_torch_compile",
    "unified_kv_cache_update",
]
