"""Questions that need heavy imports, answered in a process of their own.

``python -m vllm_suite.compat.probes NAME`` prints one JSON object on its last line. The caller sets a deadline, so
a library that hangs or crashes when it is loaded costs the caller nothing but the answer.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from typing import Any

from vllm_suite.catalog import PLUGINS

Answer = dict[str, Any]


def vllm() -> Answer:
    """The platform vLLM would run on, what torch sees, whether each plugin's classes can be imported beside it, and
    what the plugins say of themselves."""
    import torch
    from vllm.platforms import current_platform

    broken: dict[str, str] = {}
    for plugin in PLUGINS.values():
        for item in plugin.kv_connectors if plugin.landed else ():
            try:
                getattr(importlib.import_module(item.module), item.name)
            except (ImportError, AttributeError, RuntimeError) as error:
                broken[plugin.name] = f"{item.module}.{item.name}: {error}"
    parts: dict[str, dict[str, str]] = {}
    for plugin in PLUGINS.values():
        if plugin.landed and plugin.report and importlib.util.find_spec(plugin.package):
            report = importlib.import_module(plugin.report).report()
            parts[plugin.name] = report["parts"]
            if report["broken"]:
                broken[plugin.name] = report["broken"]
    return {
        "platform": current_platform.device_type,
        "torch": torch.__version__,
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "broken": broken,
        "parts": parts,
    }


def nixl() -> Answer:
    """NIXL's plugins, and whether a UCX agent can be made."""
    from nixl._api import nixl_agent, nixl_agent_config

    agent = nixl_agent("vllm-suite-doctor", nixl_agent_config(backends=["UCX"]))
    memory = sorted(str(kind) for kind in agent.get_backend_mem_types("UCX"))
    return {"plugins": sorted(agent.get_plugin_list()), "backends": ["UCX"], "ucx_memory": memory}


PROBES = {"vllm": vllm, "nixl": nixl}


def main() -> None:
    """Run the probe named on the command line."""
    answer = PROBES[sys.argv[1]]()
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
