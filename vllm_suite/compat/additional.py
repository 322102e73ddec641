"""Settings of the plugins inside vLLM's ``--additional-config``, which vLLM carries to every process unread.

Example::

    --additional-config '{"suite": {"swiftkv": {"prefill_only": true}}}'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_suite.catalog import PLUGINS, SelectionError


def section(additional_config: Any, plugin: str) -> dict[str, Any]:
    """The settings of one plugin; empty where there are none. Keys beside ``suite`` belong to others.

    Raises SelectionError for a name that is no plugin and for a section that is no object.
    """
    if not isinstance(additional_config, Mapping):
        return {}
    suite = additional_config.get("suite") or {}
    where = "additional_config.suite"
    if not isinstance(suite, Mapping):
        raise SelectionError(f"{where} must be an object of plugins, not {suite!r}")
    unknown = sorted(str(name) for name in suite if name not in PLUGINS)
    if unknown:
        raise SelectionError(f"{where}: unknown plugin {unknown[0]!r}; known plugins: {', '.join(PLUGINS)}")
    found = suite.get(plugin) or {}
    if not isinstance(found, Mapping):
        raise SelectionError(f"{where}.{plugin} must be an object of settings, not {found!r}")
    return dict(found)
