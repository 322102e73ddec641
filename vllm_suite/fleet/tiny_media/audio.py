"""Qwen2-Audio: clips of up to 30 s at 16 kHz, 25 tokens for each second."""

from __future__ import annotations

from vllm_suite.fleet.tiny_media.config import Blueprint, MediaConfig, Shapes
from vllm_suite.fleet.tiny_media.parts import language_model, linear, norm, root_config, text_config
from vllm_suite.fleet.tiny_media.tokenizer import AUDIO, AUDIO_END, AUDIO_START, token_id

SAMPLING_RATE = 16_000
_MEL_BINS = 32
_POSITIONS = 1500  # 30 s in frames of 20 ms: the encoder always sees a padded clip of this length


def qwen2_audio(config: MediaConfig) -> Blueprint:
    """Qwen2-Audio: a Whisper encoder and a Qwen2 decoder.

    The weights have the names of the published checkpoint (`audio_tower.`, `language_model.model.`); the ones that
    transformers 5 writes are refused by vLLM 0.32.
    """
    hidden, inner, prefix = config.vision_hidden, config.vision_inner, "audio_tower."
    tower: Shapes = {
        prefix + "conv1.weight": (hidden, _MEL_BINS, 3),
        prefix + "conv1.bias": (hidden,),
        prefix + "conv2.weight": (hidden, hidden, 3),
        prefix + "conv2.bias": (hidden,),
        prefix + "embed_positions.weight": (_POSITIONS, hidden),
    }
    for i in range(config.vision_layers):
        layer = f"{prefix}layers.{i}."
        tower |= linear(layer + "self_attn.k_proj", hidden, hidden, bias=False)
        for part in ("q_proj", "v_proj", "out_proj"):
            tower |= linear(f"{layer}self_attn.{part}", hidden, hidden)
        tower |= linear(layer + "fc1", inner, hidden) | linear(layer + "fc2", hidden, inner)
        tower |= norm(layer + "self_attn_layer_norm", hidden) | norm(layer + "final_layer_norm", hidden)
    tower |= norm(prefix + "layer_norm", hidden)
    tower |= linear("multi_modal_projector.linear", config.text_hidden, hidden)
    body = root_config(
        "Qwen2AudioForConditionalGeneration",
        "qwen2_audio",
        text_config={**text_config(config, "qwen2"), "architectures": ["Qwen2ForCausalLM"]},
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "encoder_layers": config.vision_layers,
            "d_model": hidden,
            "encoder_ffn_dim": inner,
            "encoder_attention_heads": config.vision_heads,
            "num_mel_bins": _MEL_BINS,
            "max_source_positions": _POSITIONS,
            "activation_function": "gelu",
            "scale_embedding": False,
        },
        audio_token_index=token_id(AUDIO),
        vocab_size=config.vocab_size,
    )
    return Blueprint(
        config=body,
        tower=tower,
        language=language_model(config, "language_model.model.", "language_model.lm_head.weight"),
        files={
            "preprocessor_config.json": {
                "feature_extractor_type": "WhisperFeatureExtractor",
                "processor_class": "Qwen2AudioProcessor",
                "feature_size": _MEL_BINS,
                "sampling_rate": SAMPLING_RATE,
                "hop_length": 160,
                "chunk_length": 30,
                "n_fft": 400,
                "n_samples": 30 * SAMPLING_RATE,
                "nb_max_frames": 3000,
                "padding_side": "right",
                "padding_value": 0.0,
                "return_attention_mask": True,
            },
            "processor_config.json": {
                "processor_class": "Qwen2AudioProcessor",
                "audio_token": AUDIO,
                "audio_bos_token": AUDIO_START,
                "audio_eos_token": AUDIO_END,
            },
        },
        placeholders={"audio": AUDIO_START + AUDIO + AUDIO_END + "\\n"},
        numbered=True,
    )
