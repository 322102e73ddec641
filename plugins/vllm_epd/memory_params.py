"""Parameters of a multimodal model by part, from its Hugging Face config alone.

The encoder is everything that an encoder-only instance loads: the vision tower and what projects its output to the
width of the language model. The rest is the language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


class UnknownModel(ValueError):
    """The config is of no family that is known here, or a key that is needed is missing."""


@dataclass(frozen=True)
class Tower:
    """A vision transformer. Widths are in values per patch.

    Attributes:
        params: parameters of the tower.
        projector: parameters between the tower and the language model.
        peak: values per patch that are alive at once in the widest place of a layer, which is its MLP.
        heads: attention heads, for implementations that write the scores to memory.
        hidden: width of a patch.
        pixels: values of the image per patch.
    """

    params: int
    projector: int
    peak: int
    heads: int
    hidden: int
    pixels: int


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


def number(config: Config, *names: str) -> int:
    """The first of the keys that is there and a whole number. Raises UnknownModel."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    raise UnknownModel(f"the config has no {' or '.join(names)}")


def section(config: Config, *names: str) -> Config:
    """The first of the sections that is there. Raises UnknownModel."""
    for name in names:
        value = config.get(name)
        if isinstance(value, Mapping):
            return value
    raise UnknownModel(f"the config has no {' or '.join(names)}")


def model_type(config: Config) -> str:
    """The family's name. Raises UnknownModel where the config has none."""
    name = config.get("model_type")
    if not isinstance(name, str):
        raise UnknownModel("the config has no model_type")
    return name


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


def linear(inputs: int, outputs: int, bias: bool = True) -> int:
    """Parameters of a linear layer."""
    return inputs * outputs + (outputs if bias else 0)


def qwen_tower(vision: Config, out: int) -> Tower:
    """Qwen2.5-VL (RMS norms, gated MLP) or Qwen3-VL (layer norms, learned positions, deep-stack mergers)."""
    third = "deepstack_visual_indexes" in vision
    hidden, inner = number(vision, "hidden_size"), number(vision, "intermediate_size")
    patch, merge = number(vision, "patch_size"), number(vision, "spatial_merge_size")
    pixels = number({"in_channels": 3, **vision}, "in_channels") * number(vision, "temporal_patch_size") * patch**2
    norm = 2 * hidden if third else hidden
    mlp = linear(hidden, inner) * (1 if third else 2) + linear(inner, hidden)
    layer = linear(hidden, 3 * hidden) + linear(hidden, hidden) + mlp + 2 * norm
    tower = linear(pixels, hidden, bias=third) + layer * number(vision, "depth", "num_hidden_layers")
    wide = hidden * merge**2
    merger = linear(wide, wide) + linear(wide, out)
    projector = merger + norm
    if third:
        tower += number(vision, "num_position_embeddings") * hidden
        # The features of the deeper layers are normed after the merge, at its full width.
        projector += len(vision["deepstack_visual_indexes"]) * (merger + 2 * wide)
    peak = 2 * hidden + (2 if third else 3) * inner
    return Tower(tower, projector, peak, number(vision, "num_heads"), hidden, pixels)


def intern_tower(vision: Config, out: int, merge: int) -> Tower:
    """InternViT and its projector, in OpenGVLab's own form or in that of transformers."""
    hidden, inner = number(vision, "hidden_size"), number(vision, "intermediate_size")
    size, patch = (side(vision.get(key)) for key in ("image_size", "patch_size"))
    rms = vision.get("norm_type") == "rms_norm"
    bias = bool(vision.get("qkv_bias", vision.get("attention_bias", False)))
    layer = linear(hidden, 3 * hidden, bias) + linear(hidden, hidden) + linear(hidden, inner) + linear(inner, hidden)
    # Two norms, two layer scales, and where the model has them the norms of queries and keys.
    layer += (2 if rms else 4) * hidden + 2 * hidden
    layer += 2 * hidden if vision.get("qk_normalization", vision.get("use_qk_norm", False)) else 0
    positions = 1 + (size // patch) ** 2
    start = linear(3 * patch**2, hidden) + hidden + positions * hidden
    tower = start + layer * number(vision, "num_hidden_layers")
    wide = hidden * merge**2
    projector = 2 * wide + linear(wide, out) + linear(out, out)
    return Tower(tower, projector, 2 * hidden + 2 * inner, number(vision, "num_attention_heads"), hidden, 3 * patch**2)


def siglip_tower(vision: Config, projector: int) -> Tower:
    """SigLIP's encoder without the pooling head, which no model here loads."""
    return _clip_like(vision, projector, class_token=False, patch_bias=True, norms=1)


def clip_tower(vision: Config, projector: int) -> Tower:
    """CLIP's encoder: a class token, norms on both ends."""
    return _clip_like(vision, projector, class_token=True, patch_bias=False, norms=2)


def _clip_like(vision: Config, projector: int, class_token: bool, patch_bias: bool, norms: int) -> Tower:
    hidden, inner = number(vision, "hidden_size"), number(vision, "intermediate_size")
    size, patch = side(vision.get("image_size")), side(vision.get("patch_size"))
    layer = 4 * linear(hidden, hidden) + linear(hidden, inner) + linear(inner, hidden) + 4 * hidden
    start = linear(3 * patch**2, hidden, patch_bias) + ((size // patch) ** 2 + class_token) * hidden
    start += hidden if class_token else 0
    tower = start + layer * number(vision, "num_hidden_layers") + 2 * norms * hidden
    return Tower(tower, projector, 2 * hidden + 2 * inner, number(vision, "num_attention_heads"), hidden, 3 * patch**2)


def side(value: object) -> int:
    """Of a square given by its side or by height and width."""
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if not isinstance(value, int):
        raise UnknownModel(f"a square is expected, not {value!r}")
    return value
