"""Settings of a plugin: checked by pydantic, refused in one line that names the key, the reason and the known keys."""

from __future__ import annotations

from collections.abc import Mapping
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
