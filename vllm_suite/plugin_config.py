"""Settings of a plugin: checked by pydantic, refused in one line that names the key, the reason and the known keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

Settings = TypeVar("Settings", bound=BaseModel)


class ConfigError(ValueError):
    """A setting that cannot work; the message names the key, the reason and the remedy."""


def checked(
    model: type[Settings], given: Mapping[str, Any], where: str, error: type[ValueError] = ConfigError
) -> Settings:
    """``given`` as a ``model``; ``where`` is the place of the settings, such as ``additional_config.suite.dler``.

    Raises:
        error: an unknown key or a wrong value.
    """
    try:
        return model.model_validate(given)
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(str(part) for part in (where, *first["loc"]))
        raise error(f"{key}: {first['msg']} (settings: {', '.join(model.model_fields)})") from problem


def from_file(
    model: type[Settings], file: Path | None, flags: Mapping[str, Any], error: type[ValueError] = ConfigError
) -> Settings:
    """The settings of a YAML file and of flags, which win.

    Raises:
        error: the file cannot be read, or something in it or in the flags is wrong; each is named with its origin.
    """
    import yaml

    values: dict[str, Any] = {}
    if file is not None:
        try:
            loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as problem:
            raise error(f"{file} cannot be read: {problem}") from problem
        if not isinstance(loaded, dict):
            raise error(f"{file} is no mapping of settings")
        values = loaded
    try:
        return model(**(values | dict(flags)))
    except ValidationError as problem:
        lines = []
        for found in problem.errors():
            key = ".".join(map(str, found["loc"])) or "settings"
            origin = f"{file}: {key}" if file is not None and key.split(".")[0] not in flags else key
            text = "no such setting" if found["type"] == "extra_forbidden" else found["msg"]
            lines.append(f"{origin}: {text}")
        raise error("; ".join(lines)) from problem
