"""The last step before vLLM builds its configuration: options, environment and endpoint of the selection."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from vllm_suite.compat import allowlist, hooks, settings
from vllm_suite.identity import Role

_log = logging.getLogger("vllm.suite")
_DONE = "_vllm_suite_prepared"


def prepare(engine_args: Any, usage_context: Any, names: Sequence[str], role: Role) -> settings.Applied | None:
    """Apply the plugins' settings to ``engine_args``; None where that was done before.

    Raises SelectionError where a plugin cannot do what it is asked for.
    """
    if getattr(engine_args, _DONE, False):
        return None
    from vllm.platforms import current_platform

    view = settings.View(role, current_platform.device_type, engine_args, hooks.refused())
    applied = settings.apply(names, view)
    setattr(engine_args, _DONE, True)
    if _is_api_server(usage_context):
        _open_endpoint()
    return applied


def _is_api_server(usage_context: Any) -> bool:
    from vllm.usage.usage_lib import UsageContext

    return bool(usage_context == UsageContext.OPENAI_API_SERVER)


def _open_endpoint() -> None:
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        _log.warning("vllm-suite: the Rust front end has no endpoint plugins; /suite/v1/state is not served")
        return
    if not allowlist.open_endpoint():
        from vllm_suite.compat.endpoint import create

        allowlist.wrap_loader(create)
