"""The plugins of the suite, by the names that ``--plugins`` takes.

Nothing here imports a plugin: packages and classes are named by strings, so reading the table costs nothing in
a process that does not use the suite.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

ENV_PLUGINS = "VLLM_SUITE_PLUGINS"
"""Comma-separated plugin names; what ``--plugins`` sets for child processes."""


@dataclass(frozen=True)
class LazyClass:
    """A class that is imported where it is needed.

    ``name`` is the class name, and the registry key where vLLM has a registry for it; ``module`` is the module that
    holds it.
    """

    name: str
    module: str

    def load(self) -> Any:
        """Import the module and return the class."""
        return getattr(importlib.import_module(self.module), self.name)


@dataclass(frozen=True)
class Flag:
    """A switch of one plugin on ``vllm serve``; ``env`` is what it sets to 1 and what other processes read."""

    option: str
    env: str
    help: str

    def on(self) -> bool:
        """Whether it is on here. Raises SelectionError for a value that is neither on nor off."""
        text = os.environ.get(self.env, "")
        if text not in ("", "0", "1"):
            raise SelectionError(f"{self.env}={text!r} is neither 1 (on) nor 0 (off)")
        return text == "1"


@dataclass(frozen=True)
class PluginInfo:
    """One plugin of the suite.

    Attributes:
        landed: false for a name that is reserved but has no code yet; asking for it is an error.
        kv_connectors: registered with vLLM's KV connector factory in every process that selected the plugin.
        models: registered with vLLM's model registry, by architecture, in every such process.
        configs: module whose ``register()`` teaches transformers the ``model_type`` of those models.
        options: module with ``propose(view)`` and ``check(view)``; see `vllm_suite.compat.settings`.
        exporter: class that the control endpoint makes in each API server; see `vllm_suite.compat.endpoint`.
        report: module whose ``report()`` says what the plugin can do here; see `vllm_suite.compat.probes`.
        length_policy: function that makes the scheduler's policy; see `vllm_suite.compat.length_policy`.
        flags: switches on ``vllm serve`` beside ``--plugins``, refused without the plugin.
    """

    name: str
    package: str
    summary: str
    landed: bool = False
    kv_connectors: tuple[LazyClass, ...] = ()
    models: tuple[LazyClass, ...] = ()
    configs: str | None = None
    options: str | None = None
    exporter: LazyClass | None = None
    report: str | None = None
    length_policy: LazyClass | None = None
    flags: tuple[Flag, ...] = ()


class SelectionError(ValueError):
    """The selection cannot be honoured. The text is meant for the person who typed it."""


class UnknownPlugin(SelectionError):
    """A name that is not in the catalog."""


class NotLanded(SelectionError):
    """A name in the catalog whose code is not part of this release."""


# The package itself holds them for vLLM: its registry remembers what a class can do by a hash of the one file that
# it names, and only for a package of every file in it, our mix-ins among them.
_SWIFTKV_MODELS = (
    "LlamaSwiftKVForCausalLM",
    "MistralSwiftKVForCausalLM",
    "Qwen2SwiftKVForCausalLM",
    "Qwen3SwiftKVForCausalLM",
    "Qwen3MoeSwiftKVForCausalLM",
)

NO_LOCAL_ENCODER = Flag(
    option="--epd-no-local-encoder",
    env="VLLM_SUITE_EPD_NO_LOCAL_ENCODER",
    help="Load no vision or audio encoder: every image, video and clip comes encoded from another instance, and a "
    "request whose encoder output cannot be had fails. For roles prefill and decode of plugin epd.",
)

_TABLE = (
    PluginInfo(
        name="disagg",
        package="vllm_disagg",
        summary="prefill and decode on different instances, KV cache handed over by NIXL",
        landed=True,
        kv_connectors=(LazyClass("SuiteNixlConnector", "vllm_disagg.connector"),),
        exporter=LazyClass("DisaggExporter", "vllm_disagg.exporter"),
    ),
    PluginInfo(
        name="epd",
        package="vllm_epd",
        summary="images, video and sound encoded on instances of their own, encoder outputs handed over by NIXL",
        landed=True,
        options="vllm_epd.options",
        exporter=LazyClass("EpdExporter", "vllm_epd.exporter"),
        report="vllm_epd.report",
        flags=(NO_LOCAL_ENCODER,),
    ),
    PluginInfo(
        name="swiftkv",
        package="vllm_swiftkv",
        summary="SwiftKV models: prompt tokens skip the later layers",
        landed=True,
        models=tuple(LazyClass(name, "vllm_swiftkv") for name in _SWIFTKV_MODELS),
        configs="vllm_swiftkv.configs",
        options="vllm_swiftkv.options",
        exporter=LazyClass("SwiftKVExporter", "vllm_swiftkv.exporter"),
        report="vllm_swiftkv.report",
    ),
    PluginInfo(
        name="dler",
        package="vllm_dler",
        summary="requests ordered by expected length, learned online, with a bound on how long any of them waits",
        landed=True,
        options="vllm_dler.options",
        exporter=LazyClass("DlerExporter", "vllm_dler.exporter"),
        report="vllm_dler.report",
        length_policy=LazyClass("make_policy", "vllm_dler.policy"),
    ),
)

PLUGINS: dict[str, PluginInfo] = {plugin.name: plugin for plugin in _TABLE}


def landed_names() -> tuple[str, ...]:
    """Names that can be selected in this release, in catalog order."""
    return tuple(plugin.name for plugin in _TABLE if plugin.landed)


def parse_selection(text: str) -> tuple[str, ...]:
    """Turn ``"a,b"`` into plugin names, in the order given and each once.

    Spaces around names are ignored and an empty text selects nothing. Raises `UnknownPlugin` for a name that
    is not in the catalog and `NotLanded` for one that has no code yet.
    """
    names: list[str] = []
    for raw in text.split(","):
        name = raw.strip()
        if not name or name in names:
            continue
        plugin = PLUGINS.get(name)
        if plugin is None:
            known = ", ".join(p.name if p.landed else f"{p.name} (not landed)" for p in _TABLE)
            raise UnknownPlugin(f"unknown plugin {name!r}; known plugins: {known}")
        if not plugin.landed:
            raise NotLanded(
                f"plugin {name!r} has not landed in this release; plugins that can be used: "
                + ", ".join(landed_names())
            )
        names.append(name)
    return tuple(names)
