"""Grafana's dashboard JSON from a few words a panel (schema version 39, Grafana 10 and later)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

SELECTOR = 'fleet=~"$fleet",namespace=~"$namespace"'
"""Which fleet: labels that the chart's monitors add. All matches series without them too."""

_WIDTH, _HEIGHT, _IN_A_ROW = 8, 8, 3


class Query(NamedTuple):
    """One expression of a panel; ``FLEET`` in it stands for `SELECTOR`."""

    expr: str
    legend: str = ""


class Panel(NamedTuple):
    """One panel.

    Attributes:
        unit: Grafana's name of it (s, Bps, reqps, percentunit, short).
        stack: areas on top of each other.
    """

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    kind: Literal["timeseries", "stat"] = "timeseries"
    stack: bool = False
    description: str = ""


class Dashboard(NamedTuple):
    """One dashboard; `name` is its file and part of its uid."""

    name: str
    title: str
    description: str
    panels: tuple[Panel, ...]


def to_json(dashboard: Dashboard) -> dict[str, Any]:
    """What Grafana imports."""
    return {
        "uid": f"vllm-suite-{dashboard.name}",
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["vllm-suite"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "links": [{"type": "dashboards", "tags": ["vllm-suite"], "title": "vllm-suite", "asDropdown": True}],
        "templating": {"list": [_datasource(), _variable("namespace"), _variable("fleet")]},
        "annotations": {"list": []},
        "panels": [_panel(panel, index) for index, panel in enumerate(dashboard.panels)],
    }


def expressions(dashboard: Dashboard, selector: str = SELECTOR, interval: str = "$__rate_interval") -> list[str]:
    """All of its expressions with another selector and rate interval put in."""
    return [
        query.expr.replace("FLEET", selector).replace("$__rate_interval", interval)
        for panel in dashboard.panels
        for query in panel.queries
    ]


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus", "hide": 0}


def _variable(name: str) -> dict[str, Any]:
    query = f"label_values(vllm_suite_router_instances, {name})"
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(panel: Panel, index: int) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    custom: dict[str, Any] = {"lineWidth": 1, "fillOpacity": 30 if panel.stack else 0, "showPoints": "never"}
    if panel.stack:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    return {
        "id": index + 1,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": source,
        "gridPos": {
            "x": index % _IN_A_ROW * _WIDTH,
            "y": index // _IN_A_ROW * _HEIGHT,
            "w": _WIDTH,
            "h": _HEIGHT,
        },
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "custom": custom if panel.kind == "timeseries" else {}},
            "overrides": [],
        },
        # Many series are 0 from the start: those that moved come first.
        "options": {
            "legend": {
                "displayMode": "table",
                "placement": "bottom",
                "calcs": ["max"],
                "sortBy": "Max",
                "sortDesc": True,
            },
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
        if panel.kind == "timeseries"
        else {"reduceOptions": {"calcs": ["lastNotNull"]}},
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": source,
                "expr": query.expr.replace("FLEET", SELECTOR),
                "legendFormat": query.legend,
            }
            for number, query in enumerate(panel.queries)
        ],
    }
