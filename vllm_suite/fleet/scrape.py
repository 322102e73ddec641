"""Reads /metrics of instances and routers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import aiohttp

_TIMEOUT_S = 5.0


class Sample(NamedTuple):
    """One line of a scrape."""

    name: str
    labels: dict[str, str]
    value: float


class Samples:
    """The samples of one scrape."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples = list(samples)

    def total(self, name: str, **labels: str) -> float:
        """Sum over all samples of that name with those labels; 0 where there is none."""
        return sum((s.value for s in self._matching(name, labels)), 0.0)

    def by(self, name: str, label: str) -> dict[str, float]:
        """Sums per value of a label, those that are not 0."""
        sums: dict[str, float] = {}
        for sample in self._matching(name, {}):
            key = sample.labels.get(label, "")
            sums[key] = sums.get(key, 0.0) + sample.value
        return {key: value for key, value in sorted(sums.items()) if value}

    def _matching(self, name: str, labels: dict[str, str]) -> Iterable[Sample]:
        wanted = labels.items()
        return (s for s in self._samples if s.name == name and wanted <= s.labels.items())


def parse(text: str) -> Samples:
    """Parse Prometheus' text format. Raises ValueError where it is none."""
    from prometheus_client.parser import text_string_to_metric_families

    return Samples(
        Sample(sample.name, dict(sample.labels), float(sample.value))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    )


async def scrape(session: aiohttp.ClientSession, url: str, key: str | None = None) -> Samples | None:
    """The metrics behind a base URL; None where it gives no good answer. `key` goes out as a bearer token."""
    import aiohttp

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        async with session.get(url + "/metrics", headers=headers, timeout=timeout) as response:
            return parse(await response.text()) if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return None
