"""The rule file of a fleet, for a Prometheus without the operator; the chart makes the same of the same table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_suite.fleet.spec import FleetSpec
from vllm_suite.observability.alerts import ALERTS, Alert


def rule_file(spec: FleetSpec, selector: str = "") -> dict[str, Any]:
    """What `rule_files` of a Prometheus configuration names.

    Args:
        selector: label matchers of this fleet, where one Prometheus scrapes several, for example ``fleet="llm"``.
    """
    return {"groups": [{"name": f"vllm-suite-{spec.name}", "rules": list(_rules(spec, selector))}]}


def _rules(spec: FleetSpec, selector: str) -> Iterator[dict[str, Any]]:
    on = _on(spec)
    for alert in ALERTS:
        if alert.when not in on:
            continue
        if not alert.each:
            yield _filled(alert, FLEET=selector, ATTAINMENT=str(spec.slo.attainment))
            continue
        for role, roles, count in _floors(spec):
            yield _filled(alert, FLEET=selector, ROLES=roles, ROLE=role, COUNT=str(count))


def _floors(spec: FleetSpec) -> Iterator[tuple[str, str, int]]:
    """Role of each pool, the roles that its instances may have, and how many there should be at least."""
    counts = {}
    for role, pool in spec.pools.items():
        scaled = getattr(spec.kubernetes.pools, role).autoscaling
        counts[role] = pool.replicas if scaled is None else scaled.min_replicas
    for role, count in counts.items():
        if not count:
            continue
        if role == "any":
            yield role, "any|prefill|decode", sum(counts.get(one, 0) for one in ("any", "prefill", "decode"))
        else:
            yield role, role, count


def _on(spec: FleetSpec) -> set[str]:
    found = {"always", *spec.plugins}
    if spec.slo.ttft is not None or spec.slo.tpot is not None:
        found.add("slo")
    if spec.predicted is not None:
        found.add("predicted")
    if spec.roles.control:
        found.add("controller")
    return found


def _filled(alert: Alert, **words: str) -> dict[str, Any]:
    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(one) for key, one in value.items()}
        for word, text in words.items():
            value = value.replace(word, text)
        return value

    filled = fill(alert.rule())
    assert isinstance(filled, dict)
    return filled
