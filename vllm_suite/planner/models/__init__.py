"""Models as shapes, read from a ``config.json``: what they weigh, what they cache, what a step of them computes."""

from __future__ import annotations

from vllm_suite.planner.models.catalog import Loaded, described, load, names
from vllm_suite.planner.models.quant import Quantization
from vllm_suite.planner.models.shapes import Model, ModelError
from vllm_suite.planner.models.sharding import Parallel
from vllm_suite.planner.models.swiftkv import prefill_only, with_swiftkv

__all__ = [
    "Loaded",
    "Model",
    "ModelError",
    "Parallel",
    "Quantization",
    "described",
    "load",
    "names",
    "prefill_only",
    "with_swiftkv",
]
