"""Register the suite's models with vLLM and transformers by name, without importing them."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from vllm_suite.catalog import LazyClass


def register_models(classes: Iterable[LazyClass]) -> None:
    """Make checkpoints whose ``architectures`` names one of ``classes`` load in this process. May be called again."""
    from vllm import ModelRegistry

    for item in classes:
        if item.name not in ModelRegistry.models:
            ModelRegistry.register_model(item.name, f"{item.module}:{item.name}")


def register_configs(modules: Iterable[str]) -> None:
    """Call ``register()`` of each module, so that ``AutoConfig`` knows the models' types. May be called again."""
    for module in modules:
        importlib.import_module(module).register()
