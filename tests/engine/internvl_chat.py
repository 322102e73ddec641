"""A tiny InternVL in the layout of its authors' checkpoints (InternVL2, 2.5 and 3), which vLLM runs with classes and
processors of its own: tiles are cut by Pillow, and fields and weights have other names than in transformers' layout.
"""

from __future__ import annotations

import json
from pathlib import Path

from vllm_suite.fleet.tiny_media.config import MAX_POSITION, Blueprint, MediaConfig, Shapes
from vllm_suite.fleet.tiny_media.parts import language_model, linear, norm, root_config, text_config
from vllm_suite.fleet.tiny_media.tiled import PATCH, TILE
from vllm_suite.fleet.tiny_media.tokenizer import LLAVA_IMAGE, LLAVA_VIDEO, chat_template, write_tokenizer
from vllm_suite.fleet.tiny_media.weights import write_weights
from vllm_suite.fleet.tiny_tokenizer import BOS_ID, EOS_ID, PAD_ID

CODE = "configuration_internvl_chat"
# Such a checkpoint brings the classes of its configuration along.
SOURCE = """from transformers import PretrainedConfig, Qwen2Config


class InternVisionConfig(PretrainedConfig):
    model_type = "intern_vit_6b"


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"
    has_no_defaults_at_init = True

    def __init__(self, vision_config=None, llm_config=None, **kwargs):
        super().__init__(**kwargs)
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        self.llm_config = Qwen2Config(**(llm_config or {}))
"""


def write_internvl_chat(folder: Path) -> Path:
    """Write the checkpoint; it needs ``trust_remote_code``."""
    config = MediaConfig("internvl")
    blueprint = _blueprint(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{CODE}.py").write_text(SOURCE)
    (folder / "config.json").write_text(json.dumps(blueprint.config))
    tokens = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    (folder / "generation_config.json").write_text(json.dumps({**tokens, "_from_model_config": True}))
    write_tokenizer(folder, config.vocab_size, MAX_POSITION, chat_template(blueprint.placeholders), {})
    write_weights(folder, blueprint, config.seed)
    return folder


def _blueprint(config: MediaConfig) -> Blueprint:
    hidden, inner = config.vision_hidden, config.vision_inner
    tower: Shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, hidden),
        "vision_model.embeddings.position_embedding": (1, (TILE // PATCH) ** 2 + 1, hidden),
        "vision_model.embeddings.patch_embedding.weight": (hidden, 3, PATCH, PATCH),
        "vision_model.embeddings.patch_embedding.bias": (hidden,),
    }
    for i in range(config.vision_layers):
        layer = f"vision_model.encoder.layers.{i}."
        tower |= {layer + "ls1": (hidden,), layer + "ls2": (hidden,)}
        tower |= linear(layer + "attn.qkv", 3 * hidden, hidden, bias=False) | linear(
            layer + "attn.proj", hidden, hidden
        )
        tower |= linear(layer + "mlp.fc1", inner, hidden) | linear(layer + "mlp.fc2", hidden, inner)
        tower |= norm(layer + "norm1", hidden) | norm(layer + "norm2", hidden)
    tower |= norm("mlp1.0", 4 * hidden) | linear("mlp1.1", config.text_hidden, 4 * hidden)
    tower |= linear("mlp1.3", config.text_hidden, config.text_hidden)
    body = root_config(
        "InternVLChatModel",
        "internvl_chat",
        auto_map={"AutoConfig": f"{CODE}.InternVLChatConfig"},
        llm_config={**text_config(config, "qwen2"), "architectures": ["Qwen2ForCausalLM"]},
        vision_config={
            "architectures": ["InternVisionModel"],
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": config.vision_layers,
            "num_attention_heads": config.vision_heads,
            "image_size": TILE,
            "patch_size": PATCH,
            "norm_type": "layer_norm",
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "initializer_factor": 0.1,
            "qkv_bias": False,
            "qk_normalization": False,
            "attention_dropout": 0.0,
            "dropout": 0.0,
        },
        force_image_size=TILE,
        select_layer=-1,
        ps_version="v2",
        downsample_ratio=0.5,
        dynamic_image_size=True,
        use_thumbnail=True,
        min_dynamic_patch=1,
        max_dynamic_patch=6,
        template="internvl2_5",
    )
    return Blueprint(
        config=body,
        tower=tower,
        language=language_model(config, "language_model.model.", "language_model.lm_head.weight"),
        files={},
        placeholders={"image": LLAVA_IMAGE, "video": LLAVA_VIDEO},
    )
