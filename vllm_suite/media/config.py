"""Reading a Hugging Face ``config.json``: keys that must be there, under any of their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]


class UnknownModel(ValueError):
    """The config is of no family that is known here, or a key that is needed is missing."""


def number(config: Config, *names: str) -> int:
    """The first of the keys that is there and a whole number. Raises UnknownModel."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    raise UnknownModel(f"the config has no {' or '.join(names)}")


def section(config: Config, *names: str) -> Config:
    """The first of the sections that is there. Raises UnknownModel."""
    for name in names:
        value = config.get(name)
        if isinstance(value, Mapping):
            return value
    raise UnknownModel(f"the config has no {' or '.join(names)}")


def model_type(config: Config) -> str:
    """The family's name. Raises UnknownModel where the config has none."""
    name = config.get("model_type")
    if not isinstance(name, str):
        raise UnknownModel("the config has no model_type")
    return name


def side(value: object) -> int:
    """Of a square given by its side or by height and width."""
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if not isinstance(value, int):
        raise UnknownModel(f"a square is expected, not {value!r}")
    return value
