"""Expressions that dashboards repeat. ``FLEET`` stands for the selector of a fleet."""

from __future__ import annotations

from vllm_suite.observability.grafana import Panel, Query

_STEP = "$__rate_interval"


def rate(series: str, by: str = "", where: str = "") -> str:
    """Increase a second of a counter, summed."""
    labels = f"{where},FLEET" if where else "FLEET"
    return f"sum{_by(by)}(rate({series}{{{labels}}}[{_STEP}]))"


def total(series: str, by: str = "", where: str = "") -> str:
    """Sum of a gauge."""
    labels = f"{where},FLEET" if where else "FLEET"
    return f"sum{_by(by)}({series}{{{labels}}})"


def greatest(series: str, by: str = "", where: str = "") -> str:
    """Greatest of a gauge that several processes export alike."""
    labels = f"{where},FLEET" if where else "FLEET"
    return f"max{_by(by)}({series}{{{labels}}})"


def quantile(share: float, series: str, by: str = "", where: str = "") -> str:
    """Quantile of a histogram."""
    names = f"le, {by}" if by else "le"
    return f"histogram_quantile({share:g}, {rate(series + '_bucket', names, where)})"


def mean(series: str, by: str = "", where: str = "") -> str:
    """Mean of a histogram's observations."""
    return f"{rate(series + '_sum', by, where)} / {rate(series + '_count', by, where)}"


def rates(title: str, series: str, by: str, unit: str = "short", description: str = "") -> Panel:
    """A panel of rates by one label."""
    legend = " ".join(f"{{{{{name.strip()}}}}}" for name in by.split(","))
    return Panel(title, (Query(rate(series, by), legend),), unit, description=description)


def tails(title: str, series: str, by: str = "", unit: str = "s", description: str = "") -> Panel:
    """A panel with median and 99th percentile."""
    more = f" {{{{{by}}}}}" if by else ""
    queries = tuple(Query(quantile(share, series, by), f"p{share * 100:g}{more}") for share in (0.5, 0.99))
    return Panel(title, queries, unit, description=description)


def _by(by: str) -> str:
    return f" by ({by}) " if by else ""
