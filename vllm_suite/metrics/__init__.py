"""Every Prometheus series of the suite, in one table, of which ``python -m vllm_suite.metrics`` makes docs/metrics.md.

Names begin with ``vllm_suite_``: vLLM unregisters collectors of others whose name begins with its own prefix.
"""

from __future__ import annotations

from vllm_suite.metrics.connectors import EC, KV
from vllm_suite.metrics.engines import SCHED, SWIFTKV
from vllm_suite.metrics.roles import CONTROLLER, ROLES
from vllm_suite.metrics.router import ROUTER
from vllm_suite.metrics.table import Group, Label, SeriesSpec, within
from vllm_suite.metrics.watch import WATCH

__all__ = [
    "CONTROLLER", "EC", "GROUPS", "KV", "ROLES", "ROUTER", "SCHED", "SWIFTKV", "WATCH", "Group", "Label", "SeriesSpec",
]  # fmt: skip

_ENGINE = (within("model_name", "the model served"), within("engine", "data-parallel ranks"))
_AT = "at `/metrics` of each instance"

GROUPS: tuple[Group, ...] = (
    Group("Router", "At `/metrics` of the router.", ROUTER),
    Group("Prefill and decode", f"Plugin `disagg`, {_AT}.", KV, _ENGINE),
    Group("Encoder outputs", f"Plugin `epd`, {_AT}.", EC, _ENGINE),
    Group("SwiftKV", f"Plugin `swiftkv`, {_AT} whose model skips.", SWIFTKV, _ENGINE),
    Group("Length-aware scheduling", f"Plugin `dler`, {_AT}.", SCHED, _ENGINE),
    Group("Role of an instance", f"Role switching, {_AT} after its first switch.", ROLES),
    Group("Controller of roles", "At the `--metrics-port` of `vllm-suite roles control`.", CONTROLLER),
    Group("Replanning", "At the `--watch-metrics-port` of `vllm-suite plan --watch`.", WATCH),
)
"""All series, by the process that exports them."""
