"""What the plugin can do on this machine, for ``vllm-suite doctor``."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import vllm_swiftkv
from vllm_swiftkv.families import FAMILIES


def report() -> dict[str, Any]:
    """``broken``: why no model can be served here (None where one can); ``parts``: each part's state in words.

    Imports vLLM's model code; run it in a process of its own.
    """
    broken = None
    for family in FAMILIES:
        try:
            getattr(vllm_swiftkv, family.architecture)
        except (ImportError, AttributeError, RuntimeError) as error:
            broken = broken or f"{family.architecture}: {error}"
    return {"broken": broken, "parts": {"skip": _skip(), "late_kv kernel": _kernel(), "prefill-only": _prefill_only()}}


def _skip() -> str:
    if os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH") == "1":
        return "off: VLLM_USE_BREAKABLE_CUDAGRAPH is set, which captures the tail on every row; unset it"
    return "armed for every SwiftKV model; --no-kv-sharing-fast-prefill computes every token in every layer"


def _kernel() -> str:
    import torch

    from suite_kernels.late_kv import choose

    choice = choose("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
    if choice.kernel:
        return f"on: {choice.reason}"
    return f"off: {choice.reason}; vLLM's own op writes late keys and values"


def _prefill_only() -> str:
    missing = importlib.util.find_spec("nixl") is None
    return "off: nixl is not installed" if missing else "by additional_config.suite.swiftkv.prefill_only"
