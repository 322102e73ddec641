"""InternVL and LLaVA-OneVision: a picture is cut into tiles of 112 by 112, each tile is encoded for itself."""

from __future__ import annotations

from vllm_suite.fleet.tiny_media.config import Blueprint, MediaConfig, Shapes
from vllm_suite.fleet.tiny_media.parts import image_steps, language_model, linear, norm, root_config, text_config
from vllm_suite.fleet.tiny_media.tokenizer import (
    LLAVA_IMAGE,
    LLAVA_VIDEO,
    TILES,
    TILES_END,
    TILES_START,
    token_id,
)

TILE, PATCH = 112, 14
_PATCHES = (TILE // PATCH) ** 2
_SHRINK = 2  # InternVL: patches per side that become one token
_MAX_TILES = 6
_GRIDS = [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2)]  # LLaVA-OneVision, rows and columns of tiles


def internvl(config: MediaConfig) -> Blueprint:
    """InternVL in the layout of transformers: 16 tokens a tile, up to 6 tiles and a thumbnail."""
    hidden, inner, tower_name = config.vision_hidden, config.vision_inner, "model.vision_tower."
    tower: Shapes = {
        tower_name + "embeddings.cls_token": (1, 1, hidden),
        tower_name + "embeddings.position_embeddings": (1, _PATCHES + 1, hidden),
        tower_name + "embeddings.patch_embeddings.projection.weight": (hidden, 3, PATCH, PATCH),
        tower_name + "embeddings.patch_embeddings.projection.bias": (hidden,),
    }
    for i in range(config.vision_layers):
        layer = f"{tower_name}encoder.layer.{i}."
        tower |= {layer + "lambda_1": (hidden,), layer + "lambda_2": (hidden,)}
        for part in ("q_proj", "k_proj", "v_proj"):
            tower |= linear(f"{layer}attention.{part}", hidden, hidden, bias=False)
        tower |= linear(layer + "attention.projection_layer", hidden, hidden)
        tower |= linear(layer + "mlp.fc1", inner, hidden) | linear(layer + "mlp.fc2", hidden, inner)
        tower |= norm(layer + "layernorm_before", hidden) | norm(layer + "layernorm_after", hidden)
    merged, projector = hidden * _SHRINK**2, "model.multi_modal_projector."
    tower |= norm(projector + "layer_norm", merged)
    tower |= linear(projector + "linear_1", config.text_hidden, merged)
    tower |= linear(projector + "linear_2", config.text_hidden, config.text_hidden)
    tokens = _PATCHES // _SHRINK**2
    body = root_config(
        "InternVLForConditionalGeneration",
        "internvl",
        text_config={**text_config(config, "qwen2"), "architectures": ["Qwen2ForCausalLM"]},
        vision_config={
            "model_type": "internvl_vision",
            "architectures": ["InternVLVisionModel"],
            "num_hidden_layers": config.vision_layers,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_attention_heads": config.vision_heads,
            "image_size": [TILE, TILE],
            "patch_size": [PATCH, PATCH],
            "num_channels": 3,
            "attention_bias": False,
            "use_qk_norm": False,
            "norm_type": "layer_norm",
            "hidden_act": "gelu",
            "layer_scale_init_value": 0.1,
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
        },
        image_token_id=token_id(TILES),
        image_seq_length=tokens,
        downsample_ratio=1 / _SHRINK,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    steps = image_steps(size={"height": TILE, "width": TILE}, processor_class="InternVLProcessor")
    return Blueprint(
        config=body,
        tower=tower,
        language=language_model(config, "model.language_model.", "lm_head.weight"),
        files={
            "preprocessor_config.json": {
                **steps,
                "image_processor_type": "GotOcr2ImageProcessor",
                "crop_to_patches": True,
                "min_patches": 1,
                "max_patches": _MAX_TILES,
            },
            "video_preprocessor_config.json": {**steps, "video_processor_type": "InternVLVideoProcessor"},
            "processor_config.json": {"processor_class": "InternVLProcessor", "image_seq_length": tokens},
        },
        placeholders={"image": TILES, "video": LLAVA_VIDEO},
        extra_tokens={
            "start_image_token": TILES_START,
            "end_image_token": TILES_END,
            "context_image_token": TILES,
            "video_token": LLAVA_VIDEO,
        },
    )


def llava_onevision(config: MediaConfig) -> Blueprint:
    """LLaVA-OneVision: a SigLIP encoder, 64 tokens a tile before the padding is cut away.

    The weights have the names of the published checkpoints (`vision_tower.vision_model.`); the shorter ones that
    transformers 5 writes are refused by vLLM 0.32.
    """
    hidden, inner, prefix = config.vision_hidden, config.vision_inner, "vision_tower.vision_model."
    tower: Shapes = {
        "image_newline": (config.text_hidden,),
        prefix + "embeddings.patch_embedding.weight": (hidden, 3, PATCH, PATCH),
        prefix + "embeddings.patch_embedding.bias": (hidden,),
        prefix + "embeddings.position_embedding.weight": (_PATCHES, hidden),
    }
    for i in range(config.vision_layers):
        layer = f"{prefix}encoder.layers.{i}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tower |= linear(f"{layer}self_attn.{part}", hidden, hidden)
        tower |= linear(layer + "mlp.fc1", inner, hidden) | linear(layer + "mlp.fc2", hidden, inner)
        tower |= norm(layer + "layer_norm1", hidden) | norm(layer + "layer_norm2", hidden)
    tower |= norm(prefix + "post_layernorm", hidden)
    tower |= linear("multi_modal_projector.linear_1", config.text_hidden, hidden)
    tower |= linear("multi_modal_projector.linear_2", config.text_hidden, config.text_hidden)
    grids = [[rows * TILE, columns * TILE] for rows, columns in _GRIDS]
    body = root_config(
        "LlavaOnevisionForConditionalGeneration",
        "llava_onevision",
        text_config={**text_config(config, "qwen2"), "architectures": ["Qwen2ForCausalLM"]},
        vision_config={
            "model_type": "siglip_vision_model",
            "num_hidden_layers": config.vision_layers,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_attention_heads": config.vision_heads,
            "image_size": TILE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        image_token_index=token_id(LLAVA_IMAGE),
        video_token_index=token_id(LLAVA_VIDEO),
        image_grid_pinpoints=grids,
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        vision_aspect_ratio="anyres_max_9",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    steps = image_steps(size={"height": TILE, "width": TILE}, processor_class="LlavaOnevisionProcessor")
    return Blueprint(
        config=body,
        tower=tower,
        language=language_model(config, "language_model.model.", "language_model.lm_head.weight"),
        files={
            "preprocessor_config.json": {
                **steps,
                "image_processor_type": "LlavaOnevisionImageProcessor",
                "image_grid_pinpoints": grids,
                "do_pad": True,
            },
            "video_preprocessor_config.json": {**steps, "video_processor_type": "LlavaOnevisionVideoProcessor"},
            "processor_config.json": {
                "processor_class": "LlavaOnevisionProcessor",
                "num_image_tokens": _PATCHES,
                "vision_feature_select_strategy": "full",
                "image_token": LLAVA_IMAGE,
                "video_token": LLAVA_VIDEO,
                "vision_aspect_ratio": "anyres_max_9",
            },
        },
        placeholders={"image": LLAVA_IMAGE, "video": LLAVA_VIDEO},
    )
