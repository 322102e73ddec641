"""Number formats of weights, cache and activations: bits, and which rate of the hardware they compute at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from vllm_suite.planner.models.shapes import Linear, ModelError


@dataclass(frozen=True)
class Format:
    """A number format.

    Attributes:
        bits: of one value, its share of the scales included.
        compute: the hardware's rate that products of it run at where the activations are left to it.
    """

    bits: float
    compute: str


# Scales: AWQ and GPTQ keep 16 bits of scale and 4 of zero point for 128 values, block FP8 one float for 128 x 128,
# MXFP4 8 bits for 32 values, NVFP4 8 bits for 16.
WEIGHTS: dict[str, Format] = {
    "fp32": Format(32, "fp32"),
    "bf16": Format(16, "bf16"),
    "fp16": Format(16, "fp16"),
    "fp8": Format(8, "fp8"),
    "fp8_block": Format(8 + 32 / 128**2, "fp8"),
    "int8": Format(8, "int8"),
    "int4": Format(4 + 20 / 128, "bf16"),
    "mxfp4": Format(4 + 8 / 32, "bf16"),
    "nvfp4": Format(4 + 8 / 16, "fp4"),
}
"""int4 and mxfp4 are weights only: their products run at the rate of the activations, which are 16 bits wide."""

CACHE_BITS: dict[str, float] = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4, "nvfp4": 4.5}
"""Bits of a cached value; the per-token scales of int8 and int4 come on top, see `Quantization.cache_bytes`."""

_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "fp8_e4m3": "fp8",
          "fp8_e5m2": "fp8", "int8_per_token_head": "int8", "int4_per_token_head": "int4"}  # fmt: skip


@dataclass(frozen=True)
class Quantization:
    """How a model is stored and computed.

    Attributes:
        weights: format of the layers' products, or of the experts' alone.
        base: format of everything else: embedding, output head, norms, routers.
        kv: format of the cache.
        activations: format of the products' inputs; `auto` for what the weights' format implies.
        only: whether all products of the layers are quantised or those of the experts alone.
    """

    weights: str = "bf16"
    base: str = "bf16"
    kv: str = "bf16"
    activations: str = "auto"
    only: Literal["linears", "experts"] = "linears"

    def __post_init__(self) -> None:
        for field, value, known in (
            ("weights", self.weights, WEIGHTS),
            ("base", self.base, WEIGHTS),
            ("kv", self.kv, CACHE_BITS),
            ("activations", self.activations, {**WEIGHTS, "auto": None}),
        ):
            if value not in known:
                raise ModelError(f"quantisation: {field} is one of {', '.join(known)}, not {value!r}")

    @classmethod
    def named(cls, dtype: str, weights: str = "auto", kv: str = "auto", activations: str = "auto") -> Quantization:
        """From vLLM's names; `auto` is the checkpoint's `dtype`. Raises ModelError."""
        base, weights, kv = (_NAMES.get(name, name) for name in (dtype, weights, kv))
        base = "bf16" if base == "auto" else base
        return cls(
            base if weights == "auto" else weights,
            base,
            base if kv == "auto" else kv,
            _NAMES.get(activations, activations),
        )

    @property
    def base_bytes(self) -> float:
        """Bytes of a value that is not quantised."""
        return WEIGHTS[self.base].bits / 8

    @property
    def activation_bytes(self) -> float:
        """Bytes of a value between products; a quantised input is made of it just before its product."""
        return self.base_bytes

    def of(self, linear: Linear) -> Format:
        """The format of a product's weights."""
        quantised = linear.quantised and (self.only == "linears" or linear.experts > 1)
        return WEIGHTS[self.weights if quantised else self.base]

    def compute(self, linear: Linear) -> str:
        """The hardware's rate that a product runs at."""
        found = self.of(linear)
        if self.activations == "auto" or found is WEIGHTS[self.base]:
            # Weight-only formats are widened to the type of the activations.
            return self.base if found.compute == "bf16" else found.compute
        wide = max((found, WEIGHTS[self.activations]), key=lambda each: each.bits)
        return wide.compute

    def linear_bytes(self, linear: Linear, weights: float, biases: float) -> float:
        """Bytes of so many weights and biases of a product."""
        return weights * self.of(linear).bits / 8 + biases * self.base_bytes

    def cache_bytes(self, values: float, heads: float) -> float:
        """Bytes of a token's `values` cached values in `heads` heads of keys and of values."""
        scales = 2 * heads * 4 if self.kv in ("int8", "int4") else 0
        return values * CACHE_BITS[self.kv] / 8 + scales


def quantization_of(config: Mapping[str, Any], dtype: str) -> Quantization:
    """What a checkpoint's `quantization_config` says. Raises ModelError for a method that is not known."""
    plain = Quantization.named(dtype)
    found = config.get("quantization_config")
    if not isinstance(found, Mapping):
        return plain
    method = str(found.get("quant_method", ""))
    if method == "fp8":
        return replace(plain, weights="fp8_block" if found.get("weight_block_size") else "fp8")
    if method in ("gptq", "awq") and found.get("bits", found.get("w_bit", 4)) in (4, 8):
        bits = found.get("bits", found.get("w_bit", 4))
        return replace(plain, weights="int4") if bits == 4 else replace(plain, weights="int8", activations=plain.base)
    if method in ("mxfp4", "gpt_oss_mxfp4"):
        return replace(plain, weights="mxfp4", only="experts")
    if method == "compressed-tensors":
        return _compressed(found, plain)
    if method == "modelopt":
        algorithm = str(found.get("quant_algo", "")).upper()
        if algorithm in ("FP8", "NVFP4"):
            return replace(plain, weights=algorithm.lower())
    raise ModelError(f"quantization_config: {method or found!r} is not known; name the formats of weights and cache")


def _compressed(found: Mapping[str, Any], plain: Quantization) -> Quantization:
    groups = list((found.get("config_groups") or {}).values())
    weights = (groups[0].get("weights") or {}) if groups else {}
    inputs = groups[0].get("input_activations") if groups else None
    name = {("float", 8): "fp8", ("int", 8): "int8", ("int", 4): "int4", ("float", 4): "nvfp4"}.get(
        (str(weights.get("type")), weights.get("num_bits", 0))
    )
    if name is None:
        raise ModelError("quantization_config: no known format of weights in the first config group")
    cache = (found.get("kv_cache_scheme") or {}).get("num_bits")
    kv = "fp8" if cache == 8 else plain.kv
    return replace(plain, weights=name, kv=kv, activations="auto" if inputs else plain.base)
