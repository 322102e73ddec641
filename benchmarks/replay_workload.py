"""From a trace to the requests of one run: which rows, when they arrive, and at what load."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from replay_steps import AffineSteps
from replay_traces import SERVEGEN_LENGTHS_S, SERVEGEN_WINDOW_S, Client, Row, read_rows, read_servegen

DAY_S = 86400


@dataclass(frozen=True)
class Arrivals:
    """When requests come.

    Attributes:
        kind: "recorded" keeps the trace's own pattern, stretched in time; "poisson" and "gamma" draw the gaps.
        rate: requests per second; None where `load` says it.
        load: share of what the engine can serve, see `capacity`.
        cv: coefficient of variation of the gaps, for "gamma".
    """

    kind: Literal["recorded", "poisson", "gamma"] = "poisson"
    rate: float | None = None
    load: float | None = None
    cv: float = 1.0


@dataclass(frozen=True)
class Room:
    """What an engine has: blocks of KV cache, tokens in a block, sequences in a step."""

    blocks: int
    seqs: int
    block_size: int = 16


class Source:
    """The trace files of a case, read once.

    Args:
        paths: one ServeGen archive, or tables. The requests of several tables are merged by arrival, each labelled with
            its table's name, which is what a server knows where each comes from a client of its own.
        labels: False takes every label away.
    """

    def __init__(self, paths: Sequence[Path], labels: bool = True) -> None:
        self.clients: list[Client] = []
        rows: list[Row] = []
        if len(paths) == 1 and paths[0].name.endswith((".tar.gz", ".tgz")):
            self.clients = read_servegen(paths[0])
        else:
            for path in paths:
                found = read_rows(path)
                name = path.name.split(".")[0]
                rows += found if len(paths) == 1 else [replace(row, label=row.label or name) for row in found]
            rows.sort(key=lambda row: row.arrival_s or 0.0)
        self.rows = rows
        self.labels = labels

    def draw(self, count: int, seed: int, arrivals: Arrivals, room: Room, steps: AffineSteps) -> list[Row]:
        """`count` requests in order of arrival, the first at 0. The same arguments give the same requests.

        Recorded arrivals: seed k takes the k-th window of `count` requests, so that two seeds share none. Otherwise
        rows are drawn without replacement. Raises ValueError where the trace has not that many.
        """
        draw = random.Random(f"{seed}/{count}")
        if self.clients:
            rows = _from_clients(self.clients, count, seed, draw)
        elif arrivals.kind == "recorded":
            rows = self._window(count, seed)
        elif count > len(self.rows):
            raise ValueError(f"the trace has {len(self.rows)} requests, not {count}")
        else:
            rows = draw.sample(self.rows, count)
        if not self.labels:
            rows = [replace(row, label="") for row in rows]
        rate = arrivals.rate or (arrivals.load or 1.0) * capacity(self.sample(draw), room, steps)
        times = [row.arrival_s or 0.0 for row in rows]
        if arrivals.kind != "recorded" and not self.clients:
            times = _renewal(count, arrivals.cv if arrivals.kind == "gamma" else 1.0, draw)
        span = times[-1] - times[0]
        if span <= 0:
            raise ValueError(f"the {count} requests of seed {seed} have no recorded arrivals, or all the same one")
        scale = (count - 1) / rate / span
        return [replace(row, arrival_s=(at - times[0]) * scale) for row, at in zip(rows, times, strict=True)]

    def sample(self, draw: random.Random) -> Sequence[Row]:
        """Rows that stand for the whole trace."""
        return self.rows or _from_clients(self.clients, 2000, draw.randrange(144), draw)

    def _window(self, count: int, seed: int) -> list[Row]:
        if any(row.arrival_s is None for row in self.rows):
            raise ValueError("the trace has no recorded arrivals")
        first = seed * count
        if first + count > len(self.rows):
            most = len(self.rows) // count
            raise ValueError(f"the trace has {most} windows of {count} requests, so seeds 0 to {most - 1}, not {seed}")
        return self.rows[first : first + count]


def capacity(rows: Sequence[Row], room: Room, steps: AffineSteps) -> float:
    """Requests per second at which the engine is always full, by arithmetic from mean lengths.

    A full engine holds as many sequences as have slots and KV cache at the mean context, weighted by time; each of its
    steps decodes one token of each, and each prompt is computed once (no prefix is shared, nothing is preempted).
    """
    outputs = sum(row.output for row in rows)
    context = sum(row.output * (row.prompt + row.output / 2) for row in rows) / outputs
    running = max(1.0, min(room.seqs, room.blocks * room.block_size / context))
    step = steps.step + running * (steps.per_sequence + steps.per_kv_token * context)
    prefill = steps.per_prefill_token * sum(row.prompt for row in rows)
    return len(rows) / (outputs / running * step + prefill)


def _renewal(count: int, cv: float, draw: random.Random) -> list[float]:
    shape = 1 / cv**2
    times = [0.0]
    for _ in range(count - 1):
        times.append(times[-1] + draw.gammavariate(shape, 1 / shape))
    return times


def _from_clients(clients: Sequence[Client], count: int, seed: int, draw: random.Random) -> list[Row]:
    """Each client's own arrival process and lengths, from a time of the day that the seed chooses, until there are
    `count` requests. Prompt and output of a request are drawn independently: the archive keeps no joint density."""
    start = seed * 7 % (DAY_S // SERVEGEN_WINDOW_S) * SERVEGEN_WINDOW_S
    rows: list[Row] = []
    window = start
    while len(rows) < count:
        at = window % DAY_S // SERVEGEN_WINDOW_S * SERVEGEN_WINDOW_S
        for client in clients:
            process = client.windows.get(at)
            lengths = client.lengths.get(at // SERVEGEN_LENGTHS_S * SERVEGEN_LENGTHS_S)
            if process is None or lengths is None:
                continue
            prompts, outputs = lengths
            times = list(_gaps(process, draw))
            chosen = (
                draw.choices(list(prompts), list(prompts.values()), k=len(times)),
                draw.choices(list(outputs), list(outputs.values()), k=len(times)),
            )
            rows += [
                Row(window - start + time, prompt, output, client.name)
                for time, prompt, output in zip(times, *chosen, strict=True)
            ]
        window += SERVEGEN_WINDOW_S
        if window - start > DAY_S:
            raise ValueError(f"the archive has {len(rows)} requests in a day, not {count}")
    rows.sort(key=lambda row: row.arrival_s or 0.0)
    return rows[:count]


def _gaps(process: tuple[float, float, str, float], draw: random.Random) -> list[float]:
    """Arrivals within one window of a renewal process; it is entered at a random place of its first gap."""
    rate, cv, pattern, shape = process
    gamma = 1 / max(cv, 1e-3) ** 2
    weibull = max(shape, 0.05)
    times: list[float] = []
    at = 0.0
    while True:
        if pattern == "Gamma":
            gap = draw.gammavariate(gamma, 1 / gamma) / rate
        else:
            gap = draw.weibullvariate(1 / (rate * math.gamma(1 + 1 / weibull)), weibull)
        at += gap if times or at else gap * draw.random()
        if at >= SERVEGEN_WINDOW_S:
            return times
        times.append(at)
