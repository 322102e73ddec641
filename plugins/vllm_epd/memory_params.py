"""Parameters of the language model of a multimodal model, from its Hugging Face config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_suite.media.config import Config, UnknownModel, model_type, number


@dataclass(frozen=True)
class Language:
    """A decoder with ordinary attention.

    Attributes:
        params: parameters, the output head among them.
        hidden: width of a token.
        peak: values per token that are alive at once in a prefill without chunks: the embeddings as they were put
            in, the media's own copy, residual, input, gate and up, their product, and the output of the MLP.
        kv_values: cache elements per token over all layers.
        window: longest sequence in tokens.
    """

    params: int
    hidden: int
    peak: int
    kv_values: int
    window: int


def language(config: Config) -> Language:
    """Of a text config of the Llama, Qwen2, Qwen3 or InternLM2 kind. Raises UnknownModel, also for experts."""
    kind = model_type(config)
    known = ("llama", "mistral", "qwen2", "qwen3", "internlm2", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "minicpmv")
    if kind.removesuffix("_text") not in known:
        raise UnknownModel(f"a language model of type {kind} is not counted here (mixtures of experts are not either)")
    hidden, layers = number(config, "hidden_size"), number(config, "num_hidden_layers")
    heads, inner, words = (number(config, k) for k in ("num_attention_heads", "intermediate_size", "vocab_size"))
    kv_heads = number({"num_key_value_heads": heads, **config}, "num_key_value_heads")
    head = number({"head_dim": hidden // heads, **{k: v for k, v in config.items() if v is not None}}, "head_dim")
    q, kv = heads * head, kv_heads * head
    layer = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * inner + 2 * hidden
    if kind.startswith(("qwen2", "minicpmv")):
        layer += q + 2 * kv
    elif config.get("attention_bias"):
        layer += q + 2 * kv + hidden
    if kind.startswith("qwen3"):
        layer += 2 * head
    ends = words * hidden * (1 if config.get("tie_word_embeddings") else 2) + hidden
    return Language(
        params=layer * layers + ends,
        hidden=hidden,
        peak=3 * inner + 5 * hidden,
        kv_values=2 * kv * layers,
        window=_window(config),
    )


def _window(config: Config) -> int:
    longest = number(config, "max_position_embeddings")
    scaling = config.get("rope_scaling")
    if isinstance(scaling, Mapping) and scaling.get("type") == "dynamic":
        # Dynamic scaling stretches the window by its factor; the other kinds state the stretched one.
        longest = int(longest * float(scaling.get("factor", 1.0)))
    return longest
