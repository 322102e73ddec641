"""Rows for what the SwiftKV model classes (plugins/vllm_swiftkv/models) use."""

from __future__ import annotations

from vllm_suite.compat.contracts import Contract

_LAYERS = "vllm.model_executor.layers"
_MODELS = "vllm.model_executor.models"
_ATTENTION = f"{_LAYERS}.attention.attention:Attention"
_BACKEND = "vllm.v1.attention.backend"
_BACKENDS = "vllm.v1.attention.backends.utils"
_COMMON = f"{_BACKEND}:CommonAttentionMetadata"
_LINEAR = f"{_LAYERS}.linear"
_MERGED = f"{_LINEAR}:MergedColumnParallelLinear"
_CONTEXT = "vllm.forward_context"

_LAYER_ROWS = (
    Contract(_ATTENTION, "class", "one per KV cache of the tail"),
    Contract(
        f"{_ATTENTION}.__init__",
        "method",
        "called",
        (
            "self",
            "num_heads",
            "head_size",
            "scale",
            "num_kv_heads",
            "cache_config",
            "quant_config",
            "prefix",
        ),
        more=True,
    ),
    Contract(f"{_ATTENTION}.forward", "method", "tail: no key, no value", ("self", "query", "key", "value"), more=True),
    Contract(f"{_ATTENTION}.attn_backend", "instance", "replaced where the skip is armed"),
    Contract(f"{_ATTENTION}.layer_name", "instance", "key of its metadata"),
    Contract(f"{_ATTENTION}.kv_cache", "instance", "written by the late-KV kernel"),
    Contract(f"{_ATTENTION}.head_size", "instance", "splits the cache into keys and values"),
    Contract(f"{_ATTENTION}.kv_cache_dtype", "instance", "which caches the kernel can write"),
    Contract(
        "vllm.model_executor.layers.attention.attention", "literal", "scales of a quantised cache", value="_k_scale"
    ),
    Contract(f"{_ATTENTION}.sliding_window", "instance", "refused where set"),
    Contract(
        f"{_LAYERS}.attention.attention:unified_kv_cache_update",
        "function",
        "writes late keys and values",
        ("key", "value", "layer_name"),
    ),
    Contract(f"{_LAYERS}.layernorm:RMSNorm", "class", "norms of the tail"),
    Contract(f"{_LAYERS}.layernorm:RMSNorm.variance_epsilon", "instance", "taken from a head layer's q and k norm"),
    Contract(f"{_LINEAR}:ColumnParallelLinear", "class", "late query projections"),
    Contract("vllm.lora.layers:BaseLayerWithLoRA", "class", "taken off the tail's layers where the skip is armed"),
    Contract("vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.base_layer", "instance", "put back"),
    Contract(f"{_LINEAR}:RowParallelLinear", "class", "output projections of the tail"),
    Contract(_MERGED, "class", "base of the fused projection of late keys and values"),
    Contract(f"{_MERGED}.__init__", "method", "called", ("self", "input_size", "output_sizes", "bias"), more=True),
    Contract(
        f"{_MERGED}.weight_loader",
        "method",
        "overridden, calls super",
        ("self", "param", "loaded_weight", "loaded_shard_id"),
    ),
    Contract(
        f"{_MERGED}.weight_loader_v2",
        "method",
        "overridden, calls super",
        ("self", "param", "loaded_weight", "loaded_shard_id"),
    ),
    Contract(_LINEAR, "literal", "the shard's number is read from the tensor", value="shard_id"),
    Contract(f"{_LAYERS}.logits_processor:LogitsProcessor", "class", "logits"),
    Contract(f"{_LAYERS}.vocab_parallel_embedding:ParallelLMHead", "class", "the LM head"),
    Contract(f"{_LAYERS}.vocab_parallel_embedding:ParallelLMHead.tie_weights", "method", "tied embeddings"),
    Contract(f"{_LAYERS}.vocab_parallel_embedding:VocabParallelEmbedding", "class", "the embedding"),
    Contract(
        "vllm.distributed.parallel_state:get_tensor_model_parallel_world_size",
        "function",
        "KV heads given to several ranks",
        (),
    ),
)

_FAMILY_ROWS = (
    Contract(f"{_MODELS}.llama:LlamaDecoderLayer", "class", "head layers"),
    Contract(
        f"{_MODELS}.llama:LlamaDecoderLayer.__init__", "method", "called", ("self", "vllm_config", "prefix"), True
    ),
    Contract(f"{_MODELS}.llama:LlamaMLP", "class", "MLP of the tail"),
    Contract(
        f"{_MODELS}.llama:LlamaMLP.__init__",
        "method",
        "called",
        ("self", "hidden_size", "intermediate_size", "hidden_act", "quant_config", "bias", "prefix"),
        more=True,
    ),
    Contract(f"{_MODELS}.qwen2:Qwen2DecoderLayer", "class", "head layers"),
    Contract(
        f"{_MODELS}.qwen2:Qwen2DecoderLayer.__init__",
        "method",
        "called",
        ("self", "config", "cache_config", "quant_config", "prefix"),
    ),
    Contract(f"{_MODELS}.qwen2:Qwen2MLP", "class", "MLP of the tail"),
    Contract(
        f"{_MODELS}.qwen2:Qwen2MLP.__init__",
        "method",
        "called",
        ("self", "hidden_size", "intermediate_size", "hidden_act", "quant_config", "prefix"),
    ),
    Contract(f"{_MODELS}.qwen3:Qwen3DecoderLayer", "class", "head layers"),
    Contract(
        f"{_MODELS}.qwen3:Qwen3DecoderLayer.__init__",
        "method",
        "called",
        ("self", "config", "cache_config", "quant_config", "prefix"),
        more=True,
    ),
    Contract(f"{_MODELS}.qwen3_moe:Qwen3MoeDecoderLayer", "class", "head layers"),
    Contract(
        f"{_MODELS}.qwen3_moe:Qwen3MoeDecoderLayer.__init__",
        "method",
        "called",
        ("self", "vllm_config", "prefix"),
        True,
    ),
    Contract(f"{_MODELS}.qwen3_moe:Qwen3MoeMLP", "class", "MLP of dense layers"),
    Contract(f"{_MODELS}.qwen3_moe:Qwen3MoeSparseMoeBlock", "class", "experts of the tail"),
    Contract(
        f"{_MODELS}.qwen3_moe:Qwen3MoeSparseMoeBlock.__init__",
        "method",
        "called",
        ("self", "vllm_config", "prefix"),
        True,
    ),
)

_MODEL_ROWS = (
    Contract("vllm.compilation.backends:set_model_tag", "function", "names a compiled region", ("tag",), more=True),
    Contract("vllm.compilation.decorators:support_torch_compile", "function", "compiled regions"),
    Contract("vllm.config:VllmConfig", "class", "configuration"),
    Contract(f"{_CONTEXT}:ForwardContext", "class", "the running step"),
    Contract(f"{_CONTEXT}:ForwardContext.attn_metadata", "attribute", "rows of the step"),
    Contract(f"{_CONTEXT}:ForwardContext.batch_descriptor", "attribute", "set to the tail's rows while it runs"),
    Contract(f"{_CONTEXT}:BatchDescriptor.num_tokens", "attribute", "replaced"),
    Contract(f"{_CONTEXT}:get_forward_context", "function", "the running step", ()),
    Contract(f"{_MODELS}.interfaces:SupportsLoRA", "class", "LoRA on head layers"),
    Contract(f"{_MODELS}.interfaces:SupportsQuant", "class", "quantised weights"),
    Contract(f"{_MODELS}.utils:AutoWeightsLoader", "class", "loading"),
    Contract(
        f"{_MODELS}.utils:AutoWeightsLoader.load_weights", "method", "called", ("self", "weights", "mapper"), more=True
    ),
    Contract(f"{_MODELS}.utils:WeightsMapper", "class", "names of tensors and of LoRA modules"),
    Contract(f"{_MODELS}.utils:WeightsMapper.orig_to_new_stacked", "attribute", "fused projections"),
    Contract(f"{_MODELS}.utils:WeightsMapper.orig_to_new_regex", "attribute", "refuses adapters of the tail"),
    Contract(f"{_MODELS}.utils:WeightsMapper.get_rename_mapper", "method", "used by vLLM's LoRA loader", ("self",)),
    Contract(f"{_BACKEND}:AttentionBackend", "class", "subclassed for head and tail"),
    Contract(f"{_BACKEND}:AttentionBackend.forward_includes_kv_cache_update", "attribute", "refused where true"),
    Contract(
        f"{_BACKEND}:AttentionMetadataBuilder.build",
        "method",
        "overridden, calls super",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    Contract(f"{_BACKEND}:AttentionMetadataBuilder.layer_names", "instance", "which group counts the step"),
    Contract(
        f"{_BACKEND}:subclass_attention_backend",
        "function",
        "called",
        ("name_prefix", "attention_backend_cls", "builder_cls"),
    ),
    Contract(_COMMON, "class", "the step as attention sees it"),
    *(
        Contract(f"{_COMMON}.{field}", "attribute", "read, or given for the surviving rows")
        for field in (
            "query_start_loc",
            "query_start_loc_cpu",
            "seq_lens",
            "num_reqs",
            "num_actual_tokens",
            "max_query_len",
            "max_seq_len",
            "block_table_tensor",
            "slot_mapping",
            "causal",
            "logits_indices_padded",
            "num_logits_indices",
            "max_logits_per_req",
            "is_prefilling",
            "seq_lens_cpu_upper_bound",
        )
    ),
    Contract(
        f"{_BACKENDS}:make_kv_sharing_fast_prefill_common_attn_metadata",
        "function",
        "several sampled rows per request",
        ("common_attn_metadata",),
    ),
)

ROWS = (*_LAYER_ROWS, *_FAMILY_ROWS, *_MODEL_ROWS)
