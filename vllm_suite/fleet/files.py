"""Fleet files: YAML in and out, with errors that name the file and the key."""

from __future__ import annotations

import difflib
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from vllm_suite.fleet.spec import FleetSpec

Model = TypeVar("Model", bound=BaseModel)


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
    return parse_fleet(read_text(path), str(path))


def parse_fleet(text: str, source: str = "fleet") -> FleetSpec:
    """Read a fleet from YAML text; `source` names it in errors."""
    return validated(parse_mapping(text, source), FleetSpec, source)


def read_text(path: Path) -> str:
    """Raises FleetFileError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise FleetFileError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FleetFileError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def parse_mapping(text: str, source: str) -> dict[Any, Any]:
    """A YAML mapping, in which no key comes twice. Raises FleetFileError."""
    try:
        # A SafeLoader: plain data, no Python objects.
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise FleetFileError(f"{source}: not YAML: {where}{error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise FleetFileError(f"{source}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        found = "nothing" if data is None else type(data).__name__
        raise FleetFileError(f"{source}: a mapping is expected, found {found}")
    return data


def validated(data: dict[Any, Any], model: type[Model], source: str) -> Model:
    """The settings in a mapping. Raises FleetFileError with one line a problem."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise FleetFileError("\n".join(f"{source}: {line}" for line in explain(error, model))) from error


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
