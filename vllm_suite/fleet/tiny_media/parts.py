"""Weight names and shapes that several families share."""

from __future__ import annotations

from typing import Any

from vllm_suite.fleet.tiny_media.config import HEAD_DIM, MAX_POSITION, MediaConfig, Shapes
from vllm_suite.fleet.tiny_tokenizer import BOS_ID, EOS_ID, PAD_ID

IMAGE_MEAN, IMAGE_STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]


def linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (rows, columns)}
    if bias:
        shapes[f"{name}.bias"] = (rows,)
    return shapes


def norm(name: str, width: int, bias: bool = True) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (width,)}
    if bias:
        shapes[f"{name}.bias"] = (width,)
    return shapes


def language_model(config: MediaConfig, prefix: str, head: str, qk_norm: bool = False) -> Shapes:
    """A Qwen2 decoder (biases on q, k, v), or with `qk_norm` a Qwen3 one (normalised q and k instead)."""
    hidden, inner = config.text_hidden, 2 * config.text_hidden
    q, kv = config.text_heads * HEAD_DIM, config.text_kv_heads * HEAD_DIM
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.text_layers):
        layer = f"{prefix}layers.{i}."
        shapes |= linear(layer + "self_attn.q_proj", q, hidden, bias=not qk_norm)
        shapes |= linear(layer + "self_attn.k_proj", kv, hidden, bias=not qk_norm)
        shapes |= linear(layer + "self_attn.v_proj", kv, hidden, bias=not qk_norm)
        shapes |= linear(layer + "self_attn.o_proj", hidden, q, bias=False)
        if qk_norm:
            shapes |= norm(layer + "self_attn.q_norm", HEAD_DIM, bias=False)
            shapes |= norm(layer + "self_attn.k_norm", HEAD_DIM, bias=False)
        shapes |= linear(layer + "mlp.gate_proj", inner, hidden, bias=False)
        shapes |= linear(layer + "mlp.up_proj", inner, hidden, bias=False)
        shapes |= linear(layer + "mlp.down_proj", hidden, inner, bias=False)
        shapes |= norm(layer + "input_layernorm", hidden, bias=False)
        shapes |= norm(layer + "post_attention_layernorm", hidden, bias=False)
    shapes |= norm(f"{prefix}norm", hidden, bias=False)
    shapes[head] = (config.vocab_size, hidden)
    return shapes


def text_config(config: MediaConfig, model_type: str, rope: dict[str, Any] | None = None) -> dict[str, Any]:
    """The `text_config` part of config.json; `rope` is added to the rope parameters."""
    return {
        "model_type": model_type,
        "hidden_size": config.text_hidden,
        "intermediate_size": 2 * config.text_hidden,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "num_key_value_heads": config.text_kv_heads,
        "head_dim": HEAD_DIM,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": MAX_POSITION,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **(rope or {})},
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "dtype": "float32",
    }


def root_config(architecture: str, model_type: str, **rest: Any) -> dict[str, Any]:
    """config.json with what every family's has."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "float32",
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        **rest,
    }


def image_steps(**rest: Any) -> dict[str, Any]:
    """The steps that every image processor's configuration names."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        **rest,
    }
