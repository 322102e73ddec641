"""Qwen2.5-VL and Qwen3-VL: pictures and videos of any size, one token for each 2 by 2 patches."""

from __future__ import annotations

from dataclasses import replace

from vllm_suite.fleet.tiny_media.config import Blueprint, MediaConfig, Shapes
from vllm_suite.fleet.tiny_media.parts import image_steps, language_model, linear, norm, root_config, text_config
from vllm_suite.fleet.tiny_media.tokenizer import IMAGE, VIDEO, VISION_END, VISION_START, token_id

MERGE, FRAMES = 2, 2  # patches per side and frames that become one token
_POSITIONS = 16  # per side, of Qwen3-VL's learned position table
_MIN_PIXELS, _MAX_PIXELS = 56 * 56, 1_003_520
_TOKENS = {
    "image_token_id": token_id(IMAGE),
    "video_token_id": token_id(VIDEO),
    "vision_start_token_id": token_id(VISION_START),
    "vision_end_token_id": token_id(VISION_END),
}


def _blueprint(config: MediaConfig, version: str, patch: int, body: dict[str, object], tower: Shapes) -> Blueprint:
    processor = "Qwen2_5_VLProcessor" if version == "qwen2_5_vl" else "Qwen3VLProcessor"
    video = "Qwen2VLVideoProcessor" if version == "qwen2_5_vl" else "Qwen3VLVideoProcessor"
    steps = image_steps(
        patch_size=patch,
        merge_size=MERGE,
        temporal_patch_size=FRAMES,
        processor_class=processor,
        size={"shortest_edge": _MIN_PIXELS, "longest_edge": _MAX_PIXELS},
    )
    return Blueprint(
        config={**body, **_TOKENS},
        tower=tower,
        language=language_model(config, "model.language_model.", "lm_head.weight", qk_norm=version == "qwen3_vl"),
        files={
            "preprocessor_config.json": {**steps, "image_processor_type": "Qwen2VLImageProcessor"},
            "video_preprocessor_config.json": {**steps, "video_processor_type": video},
        },
        placeholders={
            "image": VISION_START + IMAGE + VISION_END,
            "video": VISION_START + VIDEO + VISION_END,
        },
    )


def qwen2_5_vl(config: MediaConfig) -> Blueprint:
    """Qwen2.5-VL: window attention but for the last layer, M-RoPE."""
    hidden, inner, prefix = config.vision_hidden, config.vision_inner, "model.visual."
    merged = hidden * MERGE**2
    tower: Shapes = {prefix + "patch_embed.proj.weight": (hidden, 3, FRAMES, 14, 14)}
    for i in range(config.vision_layers):
        block = f"{prefix}blocks.{i}."
        tower |= norm(block + "norm1", hidden, bias=False) | norm(block + "norm2", hidden, bias=False)
        tower |= linear(block + "attn.qkv", 3 * hidden, hidden) | linear(block + "attn.proj", hidden, hidden)
        tower |= linear(block + "mlp.gate_proj", inner, hidden) | linear(block + "mlp.up_proj", inner, hidden)
        tower |= linear(block + "mlp.down_proj", hidden, inner)
    tower |= norm(prefix + "merger.ln_q", hidden, bias=False)
    tower |= linear(prefix + "merger.mlp.0", merged, merged) | linear(
        prefix + "merger.mlp.2", config.text_hidden, merged
    )
    body = root_config(
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        text_config=text_config(config, "qwen2_5_vl_text", {"mrope_section": [4, 6, 6]}),
        vision_config={
            "model_type": "qwen2_5_vl_vision",
            "depth": config.vision_layers,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_heads": config.vision_heads,
            "out_hidden_size": config.text_hidden,
            "hidden_act": "silu",
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": [config.vision_layers - 1],
        },
    )
    return _blueprint(config, "qwen2_5_vl", 14, body, tower)


def _merger(name: str, hidden: int, out: int, shuffled_norm: bool) -> Shapes:
    merged = hidden * MERGE**2
    shapes = norm(f"{name}.norm", merged if shuffled_norm else hidden)
    return shapes | linear(f"{name}.linear_fc1", merged, merged) | linear(f"{name}.linear_fc2", out, merged)


def qwen3_vl(config: MediaConfig) -> Blueprint:
    """Qwen3-VL with three deep-stack layers: an encoder output is four times as wide as the language model.

    The encoder has at least three layers, the language model at least three (one per deep-stack input).
    """
    config = replace(config, vision_layers=max(config.vision_layers, 3), text_layers=max(config.text_layers, 3))
    hidden, inner, prefix = config.vision_hidden, config.vision_inner, "model.visual."
    deep = [config.vision_layers - 3, config.vision_layers - 2, config.vision_layers - 1]
    tower: Shapes = {
        prefix + "patch_embed.proj.weight": (hidden, 3, FRAMES, 16, 16),
        prefix + "patch_embed.proj.bias": (hidden,),
        prefix + "pos_embed.weight": (_POSITIONS**2, hidden),
    }
    for i in range(config.vision_layers):
        block = f"{prefix}blocks.{i}."
        tower |= norm(block + "norm1", hidden) | norm(block + "norm2", hidden)
        tower |= linear(block + "attn.qkv", 3 * hidden, hidden) | linear(block + "attn.proj", hidden, hidden)
        tower |= linear(block + "mlp.linear_fc1", inner, hidden) | linear(block + "mlp.linear_fc2", hidden, inner)
    tower |= _merger(prefix + "merger", hidden, config.text_hidden, shuffled_norm=False)
    for i in range(len(deep)):
        tower |= _merger(f"{prefix}deepstack_merger_list.{i}", hidden, config.text_hidden, shuffled_norm=True)
    rope = {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    body = root_config(
        "Qwen3VLForConditionalGeneration",
        "qwen3_vl",
        text_config=text_config(config, "qwen3_vl_text", rope),
        vision_config={
            "model_type": "qwen3_vl_vision",
            "depth": config.vision_layers,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_heads": config.vision_heads,
            "out_hidden_size": config.text_hidden,
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "patch_size": 16,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "num_position_embeddings": _POSITIONS**2,
            "deepstack_visual_indexes": deep,
        },
    )
    return _blueprint(config, "qwen3_vl", 16, body, tower)
