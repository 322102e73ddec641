"""Let vLLM load our endpoint plugin without switching anybody else's plugin on or off.

vLLM loads endpoint plugins only where ``VLLM_PLUGINS`` names them, but that variable is an allow-list for every
plugin group at once. So where it is unset, it is set to everything vLLM would have loaded anyway, plus ours.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata

ENV = "VLLM_PLUGINS"
CONTROL = "vllm_suite_control"
BOOTSTRAP = "vllm_suite"

ENDPOINT_GROUP = "vllm.endpoint_plugins"
# Groups whose plugins vLLM loads by default, and loads only by name once ENV is set. Logits processors are not
# filtered by it.
DEFAULT_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
# Being named is what turns this one's downloads on; left out, it does what it does with no list at all.
OPT_IN_BY_NAME = frozenset({"lora_hf_hub_resolver"})


def discover() -> dict[str, list[str]]:
    """Entry-point names of every group that ENV filters."""
    return {
        group: [point.name for point in metadata.entry_points(group=group)]
        for group in (*DEFAULT_GROUPS, ENDPOINT_GROUP)
    }


def plan(current: str | None, found: Mapping[str, Iterable[str]]) -> str | None:
    """The value that ENV needs so that our endpoint loads and nothing else changes.

    ``current`` is its value now (None: unset). Returns None where no value can do that: without a list, a name
    used both by an endpoint plugin and by a plugin of another group would either open the foreign routes or
    lose the other plugin.
    """
    if current is not None:
        names = current.split(",")
        return current if CONTROL in names else ",".join([*names, CONTROL])
    default = {name for group in DEFAULT_GROUPS for name in found.get(group, ())} - OPT_IN_BY_NAME
    foreign_endpoints = set(found.get(ENDPOINT_GROUP, ())) - {CONTROL}
    if default & foreign_endpoints:
        return None
    return ",".join(sorted(default | {CONTROL}))


def open_endpoint() -> bool:
    """Set ENV for this process and its children. Returns False where `plan` found no value."""
    value = plan(os.environ.get(ENV), discover())
    if value is None:
        return False
    os.environ[ENV] = value
    return True


def wrap_loader(create: Callable[[], object]) -> None:
    """Add our endpoint to what vLLM's loader returns: the way left where `open_endpoint` returned False."""
    import vllm.plugins as plugins

    original = plugins.load_endpoint_plugins
    if getattr(original, "_vllm_suite", False):
        return

    def load_endpoint_plugins(*args: object, **kwargs: object) -> list[object]:
        return [*original(*args, **kwargs), create()]

    load_endpoint_plugins._vllm_suite = True  # type: ignore[attr-defined]
    plugins.load_endpoint_plugins = load_endpoint_plugins
