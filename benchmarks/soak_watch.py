"""What must not grow in a soak, and what must be back where it was: memory, descriptors, KV blocks, leases."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from soak_fleet import View

from vllm_suite.fleet.scrape import Samples, scrape

EVERY_S = 2.0
WARM_UP_S = 60.0
"""Of each process: first requests allocate pools that stay."""

JUDGED_S = 150.0
"""Lives that are shorter after their warm-up show noise; they are written down and not judged."""

RSS_PER_MIN = {"router": 1 << 20, "instance": 4 << 20}
"""Growth of resident memory that is allowed, bytes a minute."""

FILES_PER_MIN = 1.0
_PAGE = os.sysconf("SC_PAGE_SIZE")
_POKE = {"model": "tiny", "prompt": [5, 6, 7, 8], "max_tokens": 1, "temperature": 0}
_IDLE = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
_LEASES = "vllm_suite_kv_leases_outstanding"


@dataclass
class Life:
    """One life of a process with all that it started: seconds, resident bytes, open files."""

    name: str
    role: str
    pid: int
    at_s: list[float] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    """Open files by kind when it was last seen."""

    @property
    def kind(self) -> str:
        """Which bound it has."""
        return "router" if self.role == "router" else "instance"

    def document(self) -> dict[str, Any]:
        """As JSON types, with its growth after the warm-up and whether that is allowed."""
        kept = [i for i, at_s in enumerate(self.at_s) if at_s - self.at_s[0] >= WARM_UP_S]
        found: dict[str, Any] = {"name": self.name, "pid": self.pid, "seconds": round(self.at_s[-1] - self.at_s[0], 1)}
        found |= {
            "rss_mib": [round(self.rss[i] / (1 << 20), 1) for i in (0, -1)],
            "files": [self.files[0], self.files[-1]],
            "files_by_kind": self.kinds,
        }
        every = range(0, len(self.at_s), max(1, len(self.at_s) // 60))
        found["rss_mib_over_s"] = [[round(self.at_s[i]), round(self.rss[i] / (1 << 20), 1)] for i in every]
        found["files_over_s"] = [[round(self.at_s[i]), self.files[i]] for i in every]
        length = self.at_s[kept[-1]] - self.at_s[kept[0]] if kept else 0.0
        if length < JUDGED_S:
            return found | {"judged": False}
        at_min = [self.at_s[i] / 60 for i in kept]
        rss, files = slope(at_min, [self.rss[i] for i in kept]), slope(at_min, [self.files[i] for i in kept])
        flat = rss <= RSS_PER_MIN[self.kind] and files <= FILES_PER_MIN
        growth = {"rss_kib_per_min": round(rss / 1024, 1), "files_per_min": round(files, 3)}
        return found | growth | {"judged": True, "judged_seconds": round(length, 1), "flat": flat}


def slope(at: Sequence[float], values: Sequence[float]) -> float:
    """Theil and Sen's: the median of the slopes of all pairs, which a few high values do not move."""
    step = max(1, len(at) // 150)
    at, values = at[::step], values[::step]
    pairs = [
        (values[j] - values[i]) / (at[j] - at[i])
        for i in range(len(at))
        for j in range(i + 1, len(at))
        if at[j] > at[i]
    ]
    return statistics.median(pairs) if pairs else 0.0


class Watch:
    """Looks at every process of the fleet every two seconds."""

    def __init__(self, view: View, began: float) -> None:
        self.lives: dict[tuple[str, int], Life] = {}
        self._view = view
        self._began = began

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self.look()
            await asyncio.sleep(EVERY_S)

    def look(self) -> None:
        """One sample of all that are ready."""
        for one in self._view.members():
            pids = self._view.processes(one["name"])
            if not pids:
                continue
            sample = [usage(pid) for pid in pids]
            life = self.lives.setdefault((one["name"], pids[0]), Life(one["name"], one["role"], pids[0]))
            life.at_s.append(time.monotonic() - self._began)
            life.rss.append(sum(rss for rss, _ in sample))
            life.files.append(sum(files for _, files in sample))
            life.kinds = kinds(pids) or life.kinds


def usage(pid: int) -> tuple[int, int]:
    """Resident bytes and open files of a process; (0, 0) of one that has ended."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE, len(os.listdir(f"/proc/{pid}/fd"))
    return 0, 0


def kinds(pids: Sequence[int]) -> dict[str, int]:
    """Open files of processes by kind: socket, pipe, anon_inode:[eventpoll], a path."""
    found: Counter[str] = Counter()
    for pid in pids:
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    found[re.sub(r":\[\d+\]$", "", os.readlink(link))] += 1
    return dict(found.most_common(30))


async def at_rest(view: View, session: aiohttp.ClientSession, timeout_s: float) -> dict[str, dict[str, float]]:
    """What instances and router hold once nothing runs any more, or after `timeout_s`; all of it should be 0.

    An idle engine reports nothing, so each is asked a small request before every look.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        held = await _held(view, session)
        if not any(value for row in held.values() for value in row.values()) or time.monotonic() > deadline:
            return held
        await asyncio.sleep(0.5)


async def _held(view: View, session: aiohttp.ClientSession) -> dict[str, dict[str, float]]:
    held: dict[str, dict[str, float]] = {}
    headers = {"Authorization": f"Bearer {view.keys.upstream}"}
    for one in view.instances():
        held[one["name"]] = {"no answer": 1.0}
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            timeout = aiohttp.ClientTimeout(total=15)
            async with session.post(
                one["url"] + "/v1/completions", json=_POKE, headers=headers, timeout=timeout
            ) as answer:
                if answer.status == 200:
                    await answer.read()
                    samples = await scrape(session, one["url"], view.keys.upstream)
                    if samples is not None:
                        held[one["name"]] = {name: samples.total(name) for name in (*_IDLE, _LEASES)}
    samples = await scrape(session, view.router, view.keys.client)
    names = ("requests_in_flight", "body_bytes", "outstanding_requests", "outstanding_tokens")
    held["router"] = (
        {name: samples.total(f"vllm_suite_router_{name}") for name in names} if samples else {"no answer": 1.0}
    )
    return held


async def counters(view: View, session: aiohttp.ClientSession) -> dict[str, dict[str, float]]:
    """What the processes have counted in their present lives, the sums that tell what was recovered from."""
    found: dict[str, dict[str, float]] = {}
    for one in view.members():
        router = one["role"] == "router"
        samples = await scrape(session, one["url"], view.keys.client if router else view.keys.upstream)
        if samples is None:
            continue
        found[one["name"]] = _router_counts(samples) if router else _instance_counts(samples)
    return found


def _router_counts(samples: Samples) -> dict[str, float]:
    prefix = "vllm_suite_router_"
    rows = {f"recoveries {key}": value for key, value in samples.by(prefix + "recoveries_total", "step").items()}
    rows |= {
        f"stream_errors {key}": value for key, value in samples.by(prefix + "stream_errors_total", "reason").items()
    }
    return rows | {f"requests {key}": value for key, value in samples.by(prefix + "requests_total", "code").items()}


def _instance_counts(samples: Samples) -> dict[str, float]:
    rows = {f"pulls {key}": value for key, value in samples.by("vllm_suite_kv_pulls_total", "outcome").items()}
    rows |= {f"refused {key}": value for key, value in samples.by("vllm_suite_kv_refused_total", "reason").items()}
    rows |= {f"leases {key}": value for key, value in samples.by("vllm_suite_kv_leases_total", "end").items()}
    faults = samples.by("vllm_suite_kv_contained_faults_total", "fault")
    return rows | {f"contained {key}": value for key, value in faults.items()}
