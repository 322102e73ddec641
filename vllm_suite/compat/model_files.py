"""What a checkpoint says of itself, read before vLLM builds its configuration."""

from __future__ import annotations

from typing import Any


def read_config(engine_args: Any) -> dict[str, Any] | None:
    """``config.json`` of the model of ``engine_args``, from where vLLM will read it, with ``--hf-overrides`` applied.

    None where it cannot be known before vLLM itself has looked: weights in cloud storage, another configuration
    format, or a model that cannot be found, which is vLLM's to report. Overrides by a function are not applied.
    """
    import huggingface_hub
    from transformers import PreTrainedConfig
    from vllm.transformers_utils.utils import is_cloud_storage

    model = engine_args.hf_config_path or engine_args.model
    if is_cloud_storage(model) or engine_args.config_format not in ("auto", "hf"):
        return None
    try:
        config, _ = PreTrainedConfig.get_config_dict(
            model,
            revision=engine_args.revision,
            token=engine_args.hf_token,
            local_files_only=huggingface_hub.constants.HF_HUB_OFFLINE,
        )
    except (OSError, ValueError):
        return None
    overrides = engine_args.hf_overrides if isinstance(engine_args.hf_overrides, dict) else {}
    return {**config, **overrides} if config else None


def is_multimodal(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` describes a model that takes images, sound or the like.

    By its architecture as vLLM lists them; one that vLLM does not know, by a section for an encoder.
    """
    from vllm.model_executor.models.registry import _MULTIMODAL_MODELS

    named = set(config.get("architectures") or ())
    if named & _MULTIMODAL_MODELS.keys():
        return True
    return any(isinstance(config.get(section), dict) for section in ("vision_config", "audio_config"))
