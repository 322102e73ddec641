"""From a Hugging Face ``config.json`` to the planner's shapes: what each family does that its config does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_suite.media.config import UnknownModel
from vllm_suite.media.families import Encoder, encoder_of, has_encoder
from vllm_suite.planner.models.blocks import dense_mlp, expert_mlp, grouped_query, latent
from vllm_suite.planner.models.shapes import Attention, Layer, Linear, Model, ModelError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """What holds for every model of a `model_type` and stands in no config.

    Attributes:
        qkv_bias, out_bias: biases of the attention's products; None where `attention_bias` decides.
        qk_norm: queries and keys are normed, with one weight for each value of a head.
        norms: weight vectors of the hidden width in a layer.
        norm_bias: norms are layer norms with a bias.
        gated: the MLP has a gate beside its up projection.
        tied: whether the output head is the embedding where the config is silent.
        alternating: every n-th layer attends to everything, the others to the window; 0 for the config's own rule.
    """

    qkv_bias: bool | None = None
    out_bias: bool | None = None
    qk_norm: bool = False
    norms: int = 2
    norm_bias: bool = False
    gated: bool = True
    tied: bool = False
    alternating: int = 0


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(qkv_bias=False, out_bias=False),
    "mixtral": Family(qkv_bias=False, out_bias=False),
    "internlm2": Family(),
    "phi3": Family(qkv_bias=False, out_bias=False),
    "qwen2": Family(qkv_bias=True, out_bias=False),
    "qwen2_moe": Family(qkv_bias=True, out_bias=False),
    "qwen3": Family(qk_norm=True),
    "qwen3_moe": Family(qk_norm=True),
    "gemma2": Family(norms=4, tied=True, alternating=2),
    "gemma3_text": Family(norms=4, qk_norm=True, tied=True, alternating=6),
    "gpt_oss": Family(qkv_bias=True, out_bias=True, alternating=2),
    "deepseek_v2": Family(),
    "deepseek_v3": Family(),
    "kimi_k2": Family(),
    "opt": Family(qkv_bias=True, out_bias=True, norm_bias=True, gated=False, tied=True),
}
"""By `model_type` of the text model. Any other type is read as a plain decoder, and that is said in `Model.assumed`."""

_ALIASES = {"qwen2_5_vl_text": "qwen2", "qwen2_vl_text": "qwen2", "qwen2_5_vl": "qwen2", "qwen2_vl": "qwen2",
            "qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe", "minicpmv": "qwen2",
            "qwen2_audio": "qwen2"}  # fmt: skip
_FOREIGN = ("linear_num_value_heads", "ssm_cfg", "mamba_d_state", "ssm_state_size", "layers_block_type", "rwkv_version",
            "linear_attn_config", "index_topk", "hybrid_override_pattern", "attn_layer_period")  # fmt: skip


def text_section(config: Config) -> Config:
    """The language model's part of a config; older files hold it at the top."""
    for name in ("text_config", "llm_config", "language_config"):
        found = config.get(name)
        if isinstance(found, Mapping):
            return {"tie_word_embeddings": config.get("tie_word_embeddings"), **found}
    return config


def model_of(config: Config, name: str = "", pixels: tuple[int, int] | None = None) -> Model:
    """Shapes of a config: its decoder, and its encoder where it has one. `pixels`: see `encoder_of`.

    The name is for reports. A multimodal config of a family whose encoder is not known gives the decoder alone, and
    says so in `Model.assumed`.

    Raises:
        ModelError: a needed key is missing, or the model has layers that are no attention (state-space, linear).
    """
    text = {key: value for key, value in text_section(config).items() if value is not None}
    kind = str(text.get("model_type", ""))
    kind = _ALIASES.get(kind, kind)
    foreign = [key for key in _FOREIGN if text.get(key)]
    if foreign:
        raise ModelError(f"{name or kind}: layers that are not plain attention ({foreign[0]}) are not modelled")
    family = FAMILIES.get(kind)
    assumed: tuple[str, ...] = ()
    if family is None:
        family = Family()
        assumed = (f"model_type {kind!r} is not known: read as a decoder of Llama's kind",)
    hidden, count = number(text, "hidden_size"), number(text, "num_hidden_layers")
    if text.get("word_embed_proj_dim", hidden) != hidden:
        raise ModelError(f"{name or kind}: word_embed_proj_dim differs from hidden_size, which is not modelled")
    layers = _layers(text, kind, family, hidden, count)
    outside = hidden * (2 if family.norm_bias else 1)
    if kind == "opt":
        # Learned positions, the first two of which are unused.
        outside += (number(text, "max_position_embeddings") + 2) * hidden
    return Model(
        name=name or str(config.get("_name_or_path", "")) or kind,
        model_type=str(config.get("model_type", kind)),
        hidden=hidden,
        vocab=number(text, "vocab_size"),
        layers=layers,
        tied=bool(text.get("tie_word_embeddings", family.tied)),
        outside=outside,
        longest=_longest(text),
        dtype=str(text.get("torch_dtype") or text.get("dtype") or config.get("torch_dtype") or "bfloat16"),
        assumed=assumed + _unread(config),
        encoder=_encoder(config, pixels),
    )


def _encoder(config: Config, pixels: tuple[int, int] | None) -> Encoder | None:
    try:
        return encoder_of(config, pixels) if has_encoder(config) else None
    except UnknownModel as error:
        raise ModelError(str(error)) from error


def _unread(config: Config) -> tuple[str, ...]:
    media = [key for key in ("vision_config", "audio_config", "thinker_config", "visual") if config.get(key)]
    if not media or has_encoder(config):
        return ()
    return (f"the encoder ({media[0]}) is of no known family and is left out",)


def number(config: Config, *names: str) -> int:
    """The first of the keys that holds a whole number. Raises ModelError."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    raise ModelError(f"the config has no {' or '.join(names)}")


def _layers(text: Config, kind: str, family: Family, hidden: int, count: int) -> tuple[Layer, ...]:
    windows = layer_windows(text, family, count)
    experts = experts_of(text)
    made: dict[tuple[int | None, bool], Layer] = {}
    layers = []
    for index in range(count):
        moe = experts > 0 and _sparse(text, index)
        key = (windows[index], moe)
        if key not in made:
            made[key] = _layer(text, kind, family, hidden, *key)
        layers.append(made[key])
    return tuple(layers)


def _layer(text: Config, kind: str, family: Family, hidden: int, window: int | None, moe: bool) -> Layer:
    bias = bool(text.get("attention_bias", text.get("bias", False)))
    qkv_bias = bias if family.qkv_bias is None else family.qkv_bias
    out_bias = bias if family.out_bias is None else family.out_bias
    small = family.norms * hidden * (2 if family.norm_bias else 1)
    heads = number(text, "num_attention_heads")
    linears: tuple[Linear, ...]
    attention: Attention
    if "kv_lora_rank" in text:
        linears, attention, extra = latent(
            hidden,
            heads,
            q_rank=int(text.get("q_lora_rank") or 0),
            kv_rank=number(text, "kv_lora_rank"),
            nope=number(text, "qk_nope_head_dim"),
            rope=number(text, "qk_rope_head_dim"),
            value=number(text, "v_head_dim"),
            bias=bias,
        )
        small += extra
    else:
        head = int(text.get("head_dim") or hidden // heads)
        kv_heads = int(text.get("num_key_value_heads") or heads)
        normed = family.qk_norm or bool(text.get("use_qk_norm"))
        linears, attention = grouped_query(
            hidden, heads, kv_heads, head, window=window, normed=normed, bias=qkv_bias, out_bias=out_bias
        )
        small += 2 * head if normed else 0
        if kind == "gpt_oss":
            small += heads  # attention sinks
    if moe:
        feed, extra = expert_mlp(
            hidden,
            inner=number(text, "moe_intermediate_size", "intermediate_size"),
            experts=experts_of(text),
            used=number(text, "num_experts_per_tok", "num_experts_per_token"),
            shared=_shared(text),
            shared_gate="shared_expert_intermediate_size" in text,
            bias=kind == "gpt_oss",
            correction=text.get("topk_method") == "noaux_tc" or kind in ("deepseek_v3", "kimi_k2"),
        )
        small += extra
    else:
        mlp_bias = bool(text.get("mlp_bias", family.norm_bias))
        feed = dense_mlp(hidden, number(text, "intermediate_size", "ffn_dim"), family.gated, mlp_bias)
    return Layer((*linears, *feed), attention, small, moe)


def experts_of(text: Config) -> int:
    """Routed experts of a layer, 0 for none."""
    for key in ("num_local_experts", "n_routed_experts", "num_experts"):
        if isinstance(text.get(key), int):
            return int(text[key])
    return 0


def _shared(text: Config) -> int:
    """Width of the experts that every token goes through, together."""
    if "shared_expert_intermediate_size" in text:
        return int(text["shared_expert_intermediate_size"])
    return int(text.get("n_shared_experts") or 0) * int(text.get("moe_intermediate_size") or 0)


def _sparse(text: Config, index: int) -> bool:
    if index < int(text.get("first_k_dense_replace") or 0) or index in (text.get("mlp_only_layers") or ()):
        return False
    every = int(text.get("decoder_sparse_step") or text.get("moe_layer_freq") or 1)
    return (index + 1) % every == 0 if "decoder_sparse_step" in text else index % every == 0


def layer_windows(text: Config, family: Family, count: int) -> list[int | None]:
    """The window of each layer, None where it attends to everything."""
    window = text.get("sliding_window")
    if not isinstance(window, int) or text.get("use_sliding_window") is False:
        return [None] * count
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and len(kinds) >= count:
        unknown = set(kinds) - {"sliding_attention", "full_attention"}
        if unknown:
            raise ModelError(f"layers of type {', '.join(sorted(unknown))} are not modelled")
        return [window if kind == "sliding_attention" else None for kind in kinds[:count]]
    first = int(text.get("max_window_layers") or 0)
    every = int(text.get("sliding_window_pattern") or family.alternating or 0)
    # Where layers alternate the last one of each run attends to everything.
    return [None if index < first or (every and (index + 1) % every == 0) else window for index in range(count)]


def _longest(text: Config) -> int:
    longest = number(text, "max_position_embeddings", "max_seq_len")
    scaling = text.get("rope_scaling")
    if isinstance(scaling, Mapping) and scaling.get("type") == "dynamic":
        # Dynamic scaling stretches the window by its factor; the other kinds state the stretched one.
        longest = int(longest * float(scaling.get("factor", 1.0)))
    return longest
