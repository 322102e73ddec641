"""The fleet file's keys as a Markdown table, from the descriptions of the fields themselves.

python -m vllm_suite.fleet.reference [kubernetes]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from vllm_suite.fleet.engine import EngineSpec
from vllm_suite.fleet.kubernetes import KubernetesSpec
from vllm_suite.fleet.kubernetes_pods import RolePods
from vllm_suite.fleet.spec import FleetSpec, PoolSpec
from vllm_suite.router.config import RouterConfig


def rows(model: type[BaseModel] = FleetSpec, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Key, default as YAML, meaning; sections in their order. The router's keys are documented with the router, those
    of `kubernetes` with the chart.
    """
    for name, field in model.model_fields.items():
        section = _section(field)
        yield prefix + name, _default(field, section), field.description or ""
        if section is None or section in (RouterConfig, KubernetesSpec):
            continue
        # The pools have the same keys, and each pool's `engine` those of the shared one.
        repeated = (section is PoolSpec and name != "prefill") or (section is EngineSpec and prefix)
        repeated = repeated or (section is RolePods and name != "encode")
        if not repeated:
            yield from rows(section, f"{prefix}{name}.")


def table(model: type[BaseModel] = FleetSpec, prefix: str = "") -> str:
    """The Markdown table."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    lines += [f"| `{key}` | {default} | {meaning} |" for key, default, meaning in rows(model, prefix)]
    return "\n".join(lines)


def _section(field: FieldInfo) -> type[BaseModel] | None:
    for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _default(field: FieldInfo, section: type[BaseModel] | None) -> str:
    if field.is_required():
        return "required"
    value: Any = field.get_default(call_default_factory=True)
    if value is None or section is not None:
        return ""
    # Flow style is what one would write into the file; YAML ends a bare value with a line of dots.
    plain = TypeAdapter(field.rebuild_annotation()).dump_python(value, mode="json")
    text = yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n").strip()
    return f"`{text}`"


if __name__ == "__main__":
    print(table(KubernetesSpec, "kubernetes.") if "kubernetes" in sys.argv[1:] else table())
