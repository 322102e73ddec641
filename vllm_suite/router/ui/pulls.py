"""Who pulls from whom, and how fast: totals that instances tell at each poll, compared with those of seconds ago."""

from __future__ import annotations

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
        pairs = [self._pair(key, found, before, seconds) for key, found in totals.items()]
        pairs.sort(key=lambda pair: (-(pair.bytes_per_s or 0.0), -pair.bytes_total, pair.source, pair.target))
        known = seconds > 0
        return Transfers(
            kv_bytes_per_s=sum(p.bytes_per_s or 0.0 for p in pairs if p.kind == "kv") if known else None,
            ec_bytes_per_s=sum(p.bytes_per_s or 0.0 for p in pairs if p.kind == "ec") if known else None,
            kv_pulls_per_s=sum(p.pulls_per_s or 0.0 for p in pairs if p.kind == "kv") if known else None,
            pairs=pairs[:MAX_PAIRS],
            left_out=max(0, len(pairs) - MAX_PAIRS),
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
        # A pair that was not there at the look before has begun since: instances tell totals from 0 on.
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
