"""What this instance has pulled from each peer since its start, for the state document: the live page's arrows.

Read from the instance's own series, so the two agree. In the multi-process registry, where values lie in files, they
are read at most once a second and in a thread.
"""

from __future__ import annotations

from typing import Any

from vllm_suite.compat.own_series import OwnSeries

MAX_PEERS = 64
_BYTES = {"vllm_suite_kv_pull_bytes_total": "kv", "vllm_suite_ec_fetch_bytes_total": "ec"}
_PULLS = {"vllm_suite_kv_pull_seconds_count": "kv"}
_NAMES = (*_BYTES, *_PULLS)
_SHARED_S = 1.0

Totals = dict[str, dict[str, list[float | None]]]
"""By kind (`kv`: KV blocks, `ec`: encoder outputs) and peer: bytes, and pulls where they are counted by peer."""


class PullTotals:
    """One per API server."""

    def __init__(self) -> None:
        self._series = OwnSeries(_NAMES, totals, _SHARED_S)

    async def read(self) -> Totals:
        """The MAX_PEERS peers of each kind from which most came; kinds of which nothing was pulled are left out."""
        return await self._series.read({})


def totals(registry: Any) -> Totals:
    """From anything that collects like a Prometheus registry."""
    found: Totals = {}
    for metric in registry.collect():
        for sample in metric.samples:
            kind, position = _BYTES.get(sample.name), 0
            if kind is None:
                kind, position = _PULLS.get(sample.name), 1
            # A producer counts what others took of it under direction `out`; each pull is told by its consumer.
            if kind is None or sample.labels.get("direction", "in") != "in":
                continue
            row = found.setdefault(kind, {}).setdefault(sample.labels["peer"], [0.0, None])
            row[position] = (row[position] or 0.0) + sample.value
    for kind, peers in found.items():
        most = sorted(peers, key=lambda peer: -(peers[peer][0] or 0.0))[:MAX_PEERS]
        found[kind] = {peer: peers[peer] for peer in most}
    return found
