"""From selected plugins to vLLM's own documented options.

Each plugin has one function in `PROPOSALS`: it looks at the engine arguments and proposes values. A proposal is
applied only where the user left the option alone, and everything done or left undone ends up in one log line. A
plugin may also have one in `CHECKS`, which sees the arguments as vLLM will and refuses what cannot work.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from vllm_suite.catalog import PLUGINS, SelectionError
from vllm_suite.identity import Role

OPTIONS = (
    "kv_transfer_config",
    "ec_transfer_config",
    "ec_manager_config",
    "scheduler_cls",
    "limit_mm_per_prompt",
    "enable_mm_embeds",
    "kv_sharing_fast_prefill",
    "worker_extension_cls",
    "additional_config",
    "logits_processors",
)
"""Engine arguments that the suite may set; nothing else is ever touched."""

APPENDED = frozenset({"logits_processors"})
"""Lists of the user's that a proposal adds to: a guard must not be dropped because there are other processors."""

# Their value in `EngineArgs` where the user gave none.
_UNSET: tuple[object, ...] = (None, False, {}, "")

Json = dict[str, Any]


@dataclass(frozen=True)
class View:
    """What a proposal may depend on.

    ``device`` is vLLM's device type (``cpu``, ``cuda``, ...); ``engine_args`` is vLLM's `EngineArgs`, to read.
    ``refused`` are options that the user switched off in so many words (``--no-...``), which `EngineArgs` does not
    tell from the default.
    """

    role: Role
    device: str
    engine_args: Any
    refused: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Setting:
    """One proposed value. ``option`` is one of `OPTIONS`; configs are given as plain dictionaries."""

    option: str
    value: Any
    why: str


@dataclass(frozen=True)
class Note:
    """A sentence of a plugin for the log line: something that it left alone, and why."""

    text: str


Proposal = Callable[[View], "list[Setting | Note]"]


@dataclass(frozen=True)
class Applied:
    """What `apply` did: proposals that took effect, those that gave way to the user's own value, and notes."""

    set: tuple[Setting, ...]
    kept: tuple[Setting, ...]
    notes: tuple[Note, ...] = ()
    refused: frozenset[str] = frozenset()

    def __str__(self) -> str:
        parts = [f"set {flag(s.option)} {_shell(s.value)} ({s.why})" for s in self.set]
        parts += [f"kept your {flag(s.option, off=s.option in self.refused)}" for s in self.kept]
        parts += [note.text for note in self.notes]
        return "; ".join(parts) or "no engine option needed"


_KV_ROLE = {"prefill": "kv_producer", "decode": "kv_consumer", "any": "kv_both"}


def _disagg(view: View) -> list[Setting | Note]:
    kv_role = _KV_ROLE.get(view.role)
    if kv_role is None:  # an encode-only instance has no KV cache to hand over
        return []
    config: Json = {
        "kv_connector": "SuiteNixlConnector",
        "kv_connector_module_path": "vllm_disagg.connector",
        "kv_role": kv_role,
        "kv_load_failure_policy": "recompute",
    }
    if view.device == "cpu":
        config["kv_buffer_device"] = "cpu"
    return [Setting("kv_transfer_config", config, f"disagg, role {view.role}")]


def _of_plugin(name: str, function: str) -> Callable[[View], Any]:
    """A function of the module that the catalog names for this plugin, imported when it is called."""

    def call(view: View) -> Any:
        module = PLUGINS[name].options
        assert module is not None
        return getattr(importlib.import_module(module), function)(view)

    return call


_WITH_OPTIONS = tuple(name for name, plugin in PLUGINS.items() if plugin.options)

PROPOSALS: dict[str, Proposal] = {"disagg": _disagg} | {n: _of_plugin(n, "propose") for n in _WITH_OPTIONS}
CHECKS: dict[str, Callable[[View], None]] = {name: _of_plugin(name, "check") for name in _WITH_OPTIONS}


def propose(names: Iterable[str], view: View) -> list[Setting]:
    """Proposals of the selected plugins, one per option.

    Two plugins may both add keys to ``additional_config``. Raises SelectionError where they want different
    values for anything else.
    """
    return _propose(names, view)[0]


def apply(names: Iterable[str], view: View) -> Applied:
    """Set what the selected plugins need on ``view.engine_args``, in place, where the user gave nothing.

    Raises SelectionError where plugins contradict each other, or one of them the user.
    """
    names = tuple(names)
    done: list[Setting] = []
    kept: list[Setting] = []
    settings, notes = _propose(names, view)
    for setting in settings:
        given = getattr(view.engine_args, setting.option)
        value = _native(setting)
        if setting.option in APPENDED:
            value = [*(given or ()), *(item for item in value if item not in (given or ()))]
        elif setting.option in view.refused or _given(setting.option, given):
            kept.append(setting)
            continue
        setattr(view.engine_args, setting.option, value)
        done.append(setting)
    for name in names:
        if name in CHECKS:
            CHECKS[name](view)
    return Applied(tuple(done), tuple(kept), tuple(notes), view.refused)


def flag(option: str, off: bool = False) -> str:
    """Command-line spelling of an engine argument, or of its negation."""
    return ("--no-" if off else "--") + option.replace("_", "-")


def _propose(names: Iterable[str], view: View) -> tuple[list[Setting], list[Note]]:
    merged: dict[str, Setting] = {}
    notes: list[Note] = []
    for name in names:
        for item in PROPOSALS[name](view):
            if isinstance(item, Note):
                notes.append(item)
                continue
            if item.option not in OPTIONS:
                raise ValueError(f"plugin {name!r} proposes {item.option!r}, which the suite does not set")
            merged[item.option] = _merge(merged.get(item.option), item)
    return list(merged.values()), notes


def _merge(first: Setting | None, second: Setting) -> Setting:
    if first is None or first == second:
        return second
    if first.value == second.value:
        return Setting(second.option, second.value, f"{first.why}; {second.why}")
    if second.option in APPENDED:
        return Setting(second.option, [*first.value, *second.value], f"{first.why}; {second.why}")
    if second.option == "additional_config":
        clash = [k for k in first.value.keys() & second.value.keys() if first.value[k] != second.value[k]]
        if not clash:
            return Setting(second.option, first.value | second.value, f"{first.why}; {second.why}")
    raise SelectionError(f"plugins need different values of {flag(second.option)}: {first.why}; {second.why}")


def _given(option: str, value: Any) -> bool:
    # This one is never None; without a class of its own it says nothing.
    if option == "ec_manager_config" and value is not None:
        return value.encoder_cache_manager_cls is not None
    return value not in _UNSET


def _native(setting: Setting) -> Any:
    if setting.option == "kv_transfer_config":
        from vllm.config import KVTransferConfig

        return KVTransferConfig(**setting.value)
    if setting.option == "ec_transfer_config":
        from vllm.config import ECTransferConfig

        return ECTransferConfig(**setting.value)
    if setting.option == "ec_manager_config":
        from vllm.config import EncoderCacheManagerConfig

        return EncoderCacheManagerConfig(**setting.value)
    return setting.value


def _shell(value: Any) -> str:
    if isinstance(value, dict):
        return f"'{json.dumps(value)}'"
    return " ".join(value) if isinstance(value, list) else str(value)
