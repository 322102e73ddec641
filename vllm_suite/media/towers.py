"""Encoder towers: parameters by part, and the work that one item is.

The encoder is everything that an encoder-only instance loads: the tower and what projects its output to the width of
the language model.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_suite.media.config import Config, number, side
from vllm_suite.media.tokens import ImageCost


@dataclass(frozen=True)
class Tower:
    """A transformer over patches of images, or over frames of sound. Widths are in values per patch.

    Attributes:
        params: parameters of the tower.
        projector: parameters between the tower and the language model.
        peak: values per patch that are alive at once in the widest place of a layer, which is its MLP.
        heads: attention heads, for implementations that write the scores to memory.
        hidden: width of a patch.
        pixels: values of the image per patch.
        layers: transformer layers.
        layer_params: parameters of one of them.
        local: how many of the layers attend within windows only.
        span: patches of such a window.
    """

    params: int
    projector: int
    peak: int
    heads: int
    hidden: int
    pixels: int
    layers: int = 0
    layer_params: int = 0
    local: int = 0
    span: int = 0

    def flops(self, cost: ImageCost) -> float:
        """Floating-point operations of one item: products, scores, and the projector over what comes out."""
        patches = cost.tiles * cost.patches
        products = 2.0 * patches * (self.layers * self.layer_params + self.pixels * self.hidden)
        seen = (self.layers - self.local) * cost.patches + self.local * min(self.span, cost.patches)
        # The projector's weights see each row of the output once.
        return products + 4.0 * self.hidden * patches * seen + 2.0 * self.projector * cost.tokens


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
    layers = number(vision, "depth", "num_hidden_layers")
    tower = linear(pixels, hidden, bias=third) + layer * layers
    wide = hidden * merge**2
    merger = linear(wide, wide) + linear(wide, out)
    projector = merger + norm
    if third:
        tower += number(vision, "num_position_embeddings") * hidden
        # The features of the deeper layers are normed after the merge, at its full width.
        projector += len(vision["deepstack_visual_indexes"]) * (merger + 2 * wide)
    peak = 2 * hidden + (2 if third else 3) * inner
    whole = vision.get("fullatt_block_indexes")
    local = layers - len(whole) if isinstance(whole, list) else 0
    span = (int(vision.get("window_size", 112)) // patch) ** 2
    return Tower(
        tower, projector, peak, number(vision, "num_heads"), hidden, pixels, layers, layer, local, span if local else 0
    )


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
    layers = number(vision, "num_hidden_layers")
    wide = hidden * merge**2
    projector = 2 * wide + linear(wide, out) + linear(out, out)
    heads = number(vision, "num_attention_heads")
    return Tower(start + layer * layers, projector, 2 * hidden + 2 * inner, heads, hidden, 3 * patch**2, layers, layer)


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
    layers = number(vision, "num_hidden_layers")
    tower = start + layer * layers + 2 * norms * hidden
    heads = number(vision, "num_attention_heads")
    return Tower(tower, projector, 2 * hidden + 2 * inner, heads, hidden, 3 * patch**2, layers, layer)


def whisper_tower(audio: Config, out: int) -> Tower:
    """Whisper's encoder over mel frames, with two convolutions in front and one product behind (Qwen2-Audio)."""
    hidden, inner = number(audio, "d_model"), number(audio, "encoder_ffn_dim")
    bins, positions = number(audio, "num_mel_bins"), number(audio, "max_source_positions")
    # Keys have no bias.
    layer = 3 * linear(hidden, hidden) + linear(hidden, hidden, bias=False)
    layer += linear(hidden, inner) + linear(inner, hidden) + 4 * hidden
    layers = number(audio, "encoder_layers")
    start = linear(3 * bins, hidden) + linear(3 * hidden, hidden) + positions * hidden
    heads = number(audio, "encoder_attention_heads")
    projector = linear(hidden, out)
    # One position stands for two frames of three taps each, and the second convolution for as many again.
    pixels = 2 * 3 * bins + 3 * hidden
    tower = start + layer * layers + 2 * hidden
    return Tower(tower, projector, 2 * hidden + 2 * inner, heads, hidden, pixels, layers, layer)
