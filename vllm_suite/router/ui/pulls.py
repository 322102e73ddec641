"""Who pulls from whom, and how fast: totals that instances tell at each poll, compared with those of seconds ago."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable

from vllm_suite.router.members import Pool, Pulled
from vllm_suite.router.ui.document import MAX_PAIRS, MAX_TEXT, Pair, Transfers

KEPT = 4
"""Snapshots that rates look back over: 15 to 20 s at History's step."""

_Key = tuple[str, str, str, str]  # kind, source, target, the target's epoch


class PullRates:
    """Rates are null until there are two looks to compare."""

    def __init__(self, pool: Pool, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._clock = clock
        self._looks: deque[tuple[float, dict[_Key, Pulled]]] = deque(maxlen=KEPT)

    def tick(self) -> None:
        """Keep a look; to be called every few seconds."""
        self._looks.append((self._clock(), self._totals()))

    def transfers(self) -> Transfers:
        """All pairs in sum, and the MAX_PAIRS busiest."""
        now, totals = self._clock(), self._totals()
        at, before = self._looks[0] if self._looks else (now, {})
        seconds = now - at
        moved = {"kv": 0.0, "ec": 0.0}
        pulls = 0.0
        order: list[tuple[float, float, _Key]] = []
        for key, found in totals.items():
            # A pair that was not there at the look before has begun since: instances tell totals from 0 on.
            old = before.get(key)
            size = found.bytes - old.bytes if old is not None else found.bytes
            moved[found.kind] += max(0.0, size)
            if found.pulls is not None and found.kind == "kv":
                pulls += max(0.0, found.pulls - ((old.pulls or 0.0) if old is not None else 0.0))
            order.append((size, found.bytes, key))
        busiest = heapq.nlargest(MAX_PAIRS, order)
        known = seconds > 0
        return Transfers(
            kv_bytes_per_s=moved["kv"] / seconds if known else None,
            ec_bytes_per_s=moved["ec"] / seconds if known else None,
            kv_pulls_per_s=pulls / seconds if known else None,
            pairs=[self._pair(key, totals[key], before, seconds) for _, _, key in busiest],
            left_out=max(0, len(order) - MAX_PAIRS),
        )

    def _totals(self) -> dict[_Key, Pulled]:
        return {
            (one.kind, one.peer, member.instance_id, member.epoch): one
            for member in self._pool.members
            for one in member.state.pulled
        }

    @staticmethod
    def _pair(key: _Key, found: Pulled, before: dict[_Key, Pulled], seconds: float) -> Pair:
        _, source, target, _ = key
        old = before.get(key, Pulled(found.kind, source, 0.0, 0.0))
        known = seconds > 0
        return Pair(
            kind=found.kind,
            source=source[:MAX_TEXT],
            target=target[:MAX_TEXT],
            bytes_per_s=max(0.0, found.bytes - old.bytes) / seconds if known else None,
            pulls_per_s=(
                max(0.0, found.pulls - (old.pulls or 0.0)) / seconds if known and found.pulls is not None else None
            ),
            bytes_total=found.bytes,
            pulls_total=found.pulls,
        )
