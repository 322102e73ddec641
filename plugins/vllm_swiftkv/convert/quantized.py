"""Quantised checkpoints: which ones can be converted by copying, and what their config must say afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from vllm_swiftkv.convert.errors import ConvertError

KEY = "quantization_config"
_FORMATS = ("float-quantized", "naive-quantized", "int-quantized", "dense")
_ADVICE = "convert the unquantised checkpoint and quantise the result"


def check(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint is quantised. Raises ConvertError for a scheme whose weights cannot just be copied.

    compressed-tensors and fp8 with one scale per tensor or per output channel keep each linear layer in tensors of
    its own, with its own shape: they move with the layer.
    """
    quantization = config.get(KEY)
    if quantization is None:
        return False
    if not isinstance(quantization, dict):
        raise ConvertError(f"config.json: {KEY} is {quantization!r}; an object is expected")
    method = quantization.get("quant_method")
    if method == "fp8":
        if quantization.get("weight_block_size"):
            raise ConvertError(f"fp8 with weight_block_size is not supported; {_ADVICE}")
    elif method == "compressed-tensors":
        if quantization.get("format") not in _FORMATS:
            raise ConvertError(f"compressed-tensors format {quantization.get('format')!r} is not supported; {_ADVICE}")
        for group in (quantization.get("config_groups") or {}).values():
            weights = group.get("weights") or {}
            if group.get("targets") != ["Linear"] or weights.get("strategy", "tensor") not in ("tensor", "channel"):
                raise ConvertError(
                    f"compressed-tensors with targets {group.get('targets')} and weight strategy "
                    f"{weights.get('strategy')!r} is not supported (Linear, tensor or channel are); {_ADVICE}"
                )
    else:
        raise ConvertError(f"quant_method {method!r} is not supported (compressed-tensors and fp8 are); {_ADVICE}")
    return True


def rewritten(quantization: Mapping[str, Any], plain: Iterable[str]) -> dict[str, Any]:
    """The section of the result: `plain` are its new modules that are not quantised, as their teachers are not."""
    result = copy.deepcopy(dict(quantization))
    names = sorted(plain)
    if names:
        fp8 = "ignored_layers" if "ignored_layers" in result else "modules_to_not_convert"
        key = fp8 if result.get("quant_method") == "fp8" else "ignore"
        result[key] = [*(result.get(key) or ()), *names]
    return result
