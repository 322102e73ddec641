"""Durations and sizes as people write them in a fleet file, with the unit in the value."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

_UNITS_MS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0, "h": 3_600_000.0}
_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?)\s*(us|ms|s|m|h)\s*", re.IGNORECASE)

_UNITS_BYTES = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS_BYTES |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_duration_ms(text: object) -> float:
    """Milliseconds of "300ms", "1.5s", "2m". Raises ValueError without a unit: 300 alone could be either."""
    match = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"not a duration with a unit (us, ms, s, m, h), for example 300ms: {text!r}")
    return float(match[1]) * _UNITS_MS[match[2].lower()]


def parse_bytes(value: object) -> int:
    """Bytes of "256MiB", "2GB" or a plain whole number. Raises ValueError otherwise."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2].lower() not in _UNITS_BYTES:
        raise ValueError(f"not a size, for example 256MiB or 2GB: {value!r}")
    return int(float(match[1]) * _UNITS_BYTES[match[2].lower()])


def _text(ms: float) -> str:
    return f"{int(ms) if ms.is_integer() else ms!r}ms"


def _duration(value: Any) -> Any:
    return value if isinstance(value, float) else parse_duration_ms(value)


DurationMs = Annotated[
    float,
    BeforeValidator(_duration),
    Field(gt=0, le=7 * 24 * 3_600_000, allow_inf_nan=False),
    PlainSerializer(_text, return_type=str),
    WithJsonSchema({"type": "string", "pattern": "^[0-9.]+ *(us|ms|s|m|h)$", "examples": ["300ms", "5s"]}),
]
"""Milliseconds in Python; text with a unit in YAML."""

Bytes = Annotated[
    int,
    BeforeValidator(parse_bytes),
    Field(gt=0),
    WithJsonSchema({"type": ["string", "integer"], "examples": ["256MiB", 268435456]}),
]
"""Bytes in Python; a whole number or text such as 256MiB in YAML."""
