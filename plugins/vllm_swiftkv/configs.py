"""Hugging Face config classes of the SwiftKV model types: the ordinary class and two more fields."""

from __future__ import annotations

import functools
from typing import Any

from vllm_swiftkv.families import FAMILIES, Family


def register() -> None:
    """Make ``AutoConfig`` know every SwiftKV ``model_type``. Imports transformers; may be called again."""
    from transformers import AutoConfig

    for family in FAMILIES:
        AutoConfig.register(family.model_type, config_class(family), exist_ok=True)


@functools.cache
def config_class(family: Family) -> type[Any]:
    """The config class of a family: its ordinary one with ``num_key_value_layers`` (the cut: how many layers
    compute their own keys and values) and ``key_value_group_size`` (AcrossKV)."""
    from transformers import CONFIG_MAPPING

    base = CONFIG_MAPPING[family.base_model_type]
    name = family.architecture.removesuffix("ForCausalLM") + "Config"
    fields = {
        "__annotations__": {"num_key_value_layers": int | None, "key_value_group_size": int | None},
        "__module__": __name__,
        "model_type": family.model_type,
        "num_key_value_layers": None,
        "key_value_group_size": 1,
    }
    return type(name, (base,), fields)


def __getattr__(name: str) -> Any:
    # The classes are made on first use; a process that unpickles a config asks for them by name.
    for family in FAMILIES:
        if name == family.architecture.removesuffix("ForCausalLM") + "Config":
            return config_class(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
