"""What the plugin can do on this machine, for ``vllm-suite doctor``."""

from __future__ import annotations

import importlib
from typing import Any

from pydantic import BaseModel

from vllm_dler.config import WHERE, SchedulerSettings
from vllm_dler.options import SCHEDULER


def report() -> dict[str, Any]:
    """``broken``: why the scheduler cannot be used here (None where it can); ``parts``: each part's state in words.

    Imports vLLM; run it in a process of its own.
    """
    broken = None
    module, _, name = SCHEDULER.rpartition(".")
    try:
        getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError) as error:
        broken = f"{SCHEDULER}: {error}"
    return {"broken": broken, "parts": parts(SchedulerSettings())}


def parts(settings: SchedulerSettings) -> dict[str, str]:
    """Every setting with its default, one line a section; all of them are set through ``--additional-config``."""
    top = {name: value for name, value in settings if not isinstance(value, BaseModel)}
    lines = {"settings": f"{WHERE}: {_spelled(top)}"}
    for name, value in settings:
        if isinstance(value, BaseModel):
            state = {True: "on: ", False: "off: "}.get(getattr(value, "enabled", None), "")  # type: ignore[arg-type]
            lines[name] = state + _spelled({k: v for k, v in value if k != "enabled"})
    return lines


def _spelled(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
