"""Fleet files: YAML in and out, with errors that name the file and the key."""

from __future__ import annotations

import difflib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from vllm_suite.fleet.spec import FleetSpec


class FleetFileError(ValueError):
    """The file cannot be used; the text says where and why, one problem a line."""


class _Loader(yaml.SafeLoader):
    """YAML's own loader keeps the last of two equal keys, silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_fleet(path: Path) -> FleetSpec:
    """Read a fleet file. Raises FleetFileError where it is missing, not YAML, or not a FleetSpec."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FleetFileError(f"{path}: {error}") from error
    return parse_fleet(text, str(path))


def parse_fleet(text: str, source: str = "fleet") -> FleetSpec:
    """Read a fleet from YAML text; `source` names it in errors."""
    try:
        # A SafeLoader: plain data, no Python objects.
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise FleetFileError(f"{source}: not YAML: {error}") from error
    if not isinstance(data, dict):
        raise FleetFileError(f"{source}: a mapping is expected, found {type(data).__name__}")
    try:
        return FleetSpec.model_validate(data)
    except ValidationError as error:
        raise FleetFileError("\n".join(f"{source}: {line}" for line in explain(error, FleetSpec))) from error


def dump_fleet(spec: FleetSpec) -> str:
    """The fleet as YAML, only what differs from the defaults. Keys of the API come out masked."""
    data = spec.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line per problem: the key's path, what is wrong, and for an unknown key the nearest known one."""
    lines: list[str] = []
    for problem in error.errors(include_url=False, include_input=False):
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(problem["loc"][-1]), _known_keys(model, problem["loc"][:-1]), 1)
            lines.append(f"{path}: unknown key" + (f" (did you mean {near[0]!r}?)" if near else ""))
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{path}: {message}" if path else message)
    return lines


def _known_keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    current: type[BaseModel] | None = model
    for part in path:
        field = current.model_fields.get(str(part)) if current else None
        current = _model_in(field.annotation) if field else None
    return list(current.model_fields) if current else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found:
            return found
    return None
