"""E1, E2, E3 and E5: the tables of EPD (arXiv 2501.05460v4), by formula and out of the simulator.

The paper's figures were transcribed by a third party, so each is right up to a slip of the pen. Its engines are those
of 2024 (vLLM 0.6.1, eager, FP16) on 8 x A100-80GB; they are described by constants, taken from the paper's own tables
as each check's note says, and by no source of step times.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import load
from vllm_suite.planner.plan import Plan, PoolPlan, Role
from vllm_suite.planner.simulator.fleet import FleetRun, simulate_plan
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.simulator.setting import Serving, Setting
from vllm_suite.planner.simulator.switching import Stage, Switch, Switching, epd_rule
from vllm_suite.planner.sources.base import FloatArray, LatencySource, Outside, Uncertainty, as_arrays
from vllm_suite.planner.sources.steps import DecodeLine, Steps
from vllm_suite.planner.validation.check import Check, Verdict, not_run, relative
from vllm_suite.planner.workload import Item, Request

ORIGIN = "EPD paper, 8 x A100-80GB"
ENCODERS = 6
"""That a request's images are dealt over: EPD's 6E1P1D."""
ROWS = 640
"""Tokens of a 4032x3024 picture of MiniCPM-V 2.6: ten tiles of 64."""

Point = tuple[int, int, float]
"""Images, encoders, seconds to the first token."""


@dataclass(frozen=True)
class Constants:
    """T(n) = ceil(n / k) encode + n prefill + rest, seconds."""

    encode: float
    prefill: float
    rest: float

    def seconds(self, images: int, encoders: int) -> float:
        """Time to the first token of a request alone."""
        return ceil(images / encoders) * self.encode + images * self.prefill + self.rest


def fit(points: Sequence[Point]) -> Constants:
    """Least squares of relative errors."""
    rows = np.array([[ceil(images / encoders), images, 1.0] for images, encoders, _ in points])
    times = np.array([seconds for _, _, seconds in points])
    found, *_ = np.linalg.lstsq(rows / times[:, None], np.ones(len(points)), rcond=None)
    return Constants(*(float(each) for each in found))


class Fixed(LatencySource):
    """Seconds for each token of a prompt, and for a step that decodes, whatever its size."""

    def __init__(self, token: float, decode: float) -> None:
        self.token, self.decode = token, decode
        self.name, self.outside = "constants", Outside("refuse")
        self.uncertainty = Uncertainty(0.0, "constants of a published table")

    def step_seconds(self, steps: Steps) -> float:
        """See `LatencySource`."""
        return float(self.token * steps.prefill_tokens + (self.decode if steps.decode_sequences else 0.0))

    def seconds(self, steps: Steps) -> FloatArray:
        """See `LatencySource`."""
        arrays = as_arrays(steps)
        return np.asarray(self.token * arrays.prefill_tokens + self.decode * (arrays.decode_sequences > 0))

    def decode_line(self, sequences: int, context: float, longest: float = 0, shortest: float = 0) -> DecodeLine:
        """See `LatencySource`."""
        return DecodeLine(self.decode, 0.0)


def setting(constants: Constants, decode: float) -> Setting:
    """EPD's engines: prefill's token is the client's first, the rest of T(n) is a hop on the way, items are dealt to
    the encoder with least to do, nothing is scheduled ahead or found in a cache.
    """
    # The language model of MiniCPM-V 2.6 is Qwen2-7B; its shapes give the sizes of what is handed over.
    model, quant = load("Qwen/Qwen2.5-7B-Instruct")
    source = Fixed(constants.prefill / ROWS, decode)
    return Setting(
        model,
        quant,
        cluster("8xA100-80G"),
        lambda pool: source,
        encode_seconds=lambda pool, item: constants.encode,
        prefix_caching=False,
        async_scheduling=False,
        serving=Serving(
            min_prompt_tokens=0, hop_s=constants.rest, streams="prefill", encode_policy="least_encode_tokens"
        ),
    )


def epd(encode: int, prefill: int, decode: int, *, batch: int = 256) -> Plan:
    """So many engines; encoders and prefill take one request at a time, decode a batch."""
    return Plan(
        (
            PoolPlan("encode", encode),
            PoolPlan("prefill", prefill, max_num_seqs=1, max_num_batched_tokens=65536, kv_blocks=20_000),
            PoolPlan("decode", decode, max_num_seqs=batch, kv_blocks=20_000),
        )
    )


def pictures(number: int, arrival: float, images: int, output: int) -> Request:
    """A request of so many pictures and next to no text."""
    items = tuple(Item("4032x3024", ROWS, content=None) for _ in range(images))
    return Request(number, arrival, images * ROWS + 1, output, items=items)


def alone(constants: Constants, images: int, encoders: int) -> float:
    """Time to the first token of a request alone, simulated."""
    found: list[Served] = []
    simulate_plan(epd(encoders, 1, 1), setting(constants, 0.025), [pictures(0, 0.0, images, 2)], found.append)
    return found[0].ttft


def checks(data: Path) -> Iterator[Check]:
    """All of this module.

    Args:
        data: the folder with ``measured/epd/paper_tables.json``.
    """
    path = data / "measured" / "epd" / "paper_tables.json"
    if path.is_file():
        tables = json.loads(path.read_text(encoding="utf-8"))
        yield from irp(tables["table4_irp_ttft_s"])
        yield from frames(tables["table1_videomme_ttft_s"])
        yield from switching(tables)
    else:
        for id in ("E1", "E2", "E3"):
            yield not_run(id, "EPD's tables", f"{path} is not there", ORIGIN)
    yield rule()


def _points(sizes: Sequence[int], rows: Iterable[tuple[int, Sequence[float]]], only: Sequence[int]) -> list[Point]:
    return [
        (size, encoders, seconds)
        for encoders, row in rows
        for size, seconds in zip(sizes, row, strict=True)
        if size in only
    ]


def irp(table: dict[str, Any]) -> Iterator[Check]:
    """E1: 4 and 6 images, from constants of 2 and 8."""
    sizes, rows = table["images"], ((ENCODERS, table["EPD"]), (1, table["noIRP"]))
    constants = fit(_points(sizes, rows, (sizes[0], sizes[-1])))
    note = f"k = {ENCODERS}; {_said(constants)} fitted to 2 and 8 images of both rows, none of which is counted"
    for images, encoders, seconds in _points(sizes, rows, sizes[1:-1]):
        what = f"TTFT of {images} images, {'side by side' if encoders > 1 else 'on one encoder'}, s"
        formula = constants.seconds(images, encoders)
        yield relative("E1", what, formula, seconds, ORIGIN, 0.05, note=f"formula, {note}")
        ours = alone(constants, images, encoders)
        yield relative("E1", what, ours, seconds, ORIGIN, 0.05, others={"formula": formula}, note=f"simulated, {note}")


def frames(table: dict[str, Any]) -> Iterator[Check]:
    """E2: frames of Video-MME, EPD and DistServe, which encodes on prefill."""
    sizes, rows = table["frames"], ((ENCODERS, table["EPD"]), (1, table["DistServe"]))
    every, ends = _points(sizes, rows, sizes), _points(sizes, rows, (sizes[0], sizes[-1]))
    whole, outer = fit(every), fit(ends)
    for images, encoders, seconds in every:
        what = f"TTFT of {images} frames, {'EPD' if encoders > 1 else 'DistServe'}, s"
        others: dict[str, Any] = {"simulated": alone(whole, images, encoders)}
        if (images, encoders, seconds) not in ends:
            others["formula from 8 and 64 frames"] = outer.seconds(images, encoders)
        note = f"k = {ENCODERS}; {_said(whole)} fitted to all eight cells, so this is no prediction"
        yield relative("E2", what, whole.seconds(images, encoders), seconds, ORIGIN, 0.1, others=others, note=note)
    for images, encoders, seconds in every:
        if (images, encoders, seconds) not in ends:
            what = f"TTFT of {images} frames, {'EPD' if encoders > 1 else 'DistServe'}, from 8 and 64, s"
            note = f"k = {ENCODERS}; {_said(outer)} fitted to 8 and 64 frames of both rows"
            yield relative("E2", what, alone(outer, images, encoders), seconds, ORIGIN, 0.1, note=f"simulated, {note}")


def _said(constants: Constants) -> str:
    return f"e {constants.encode:.3f}, p {constants.prefill:.4f}, c {constants.rest:.3f} s"


# E3

ARRIVALS = 3.0
REQUESTS = 100
DECODE_BATCH = 4
"""Requests that a decode engine runs at once, in the launch script of EPD's repository (`BS_CONFIG`, the last)."""


@dataclass(frozen=True)
class SwitchRun:
    """A run of E3: means of latency, TTFT and TPOT in seconds, and the engines at the end."""

    latency: float
    ttft: float
    tpot: float
    roles: tuple[int, int, int]
    run: FleetRun


def switched(constants: Constants, decode: float, how: Switching | None, *, batch: int = DECODE_BATCH) -> SwitchRun:
    """100 requests of one picture at 3/s: 10 of 50 tokens, then 90 of 500, on 5E1P2D."""
    found: list[Served] = []
    # Requests evenly spaced: the paper does not say how they arrive.
    requests = (pictures(n, n / ARRIVALS, 1, 50 if n < 10 else 500) for n in range(REQUESTS))
    run = simulate_plan(epd(5, 1, 2, batch=batch), setting(constants, decode), requests, found.append, switching=how)
    counts: dict[Role, int] = {"encode": 5, "prefill": 1, "decode": 2}
    for made in run.switches:
        if made.ended <= run.end:
            counts[made.source] -= 1
            counts[made.target] += 1
    size = len(found)
    return SwitchRun(
        sum(one.latency for one in found) / size,
        sum(one.ttft for one in found) / size,
        sum(one.tpot for one in found) / size,
        (counts["encode"], counts["prefill"], counts["decode"]),
        run,
    )


def switching(tables: dict[str, Any]) -> Iterator[Check]:
    """E3: what role switching wins."""
    table, irp_table = tables["table6_role_switch"], tables["table4_irp_ttft_s"]
    rows = ((ENCODERS, irp_table["EPD"]), (1, irp_table["noIRP"]))
    constants = fit(_points(irp_table["images"], rows, (2, 8)))
    decode = tables["table5_optimizer"]["tpot"][1]
    still = switched(constants, decode, None)
    moving = switched(constants, decode, Switching(epd_rule, every=5.0))
    floor = switched(constants, decode, Switching(epd_rule, every=5.0, floor={"encode": 2}))
    note = (
        f"encode, prefill and the rest from table 4 ({_said(constants)}); a decode step {decode} s, the shorter TPOT of"
        f" table 5; {DECODE_BATCH} requests in a decode batch and one in the others, as EPD's repository starts them;"
        " arrivals evenly spaced; a switch 0.7 s, decisions every 5 s; nothing fitted to table 6"
    )
    what = "roles at the end, 5E1P2D at first"
    verdict: Verdict = "holds" if moving.roles == (2, 1, 5) else "missed"
    told = {"with at least two encoders": _roles(floor)}
    yield Check("E3", what, _roles(moving), "2E1P5D", ORIGIN, None, "exact", verdict, told, note)
    for name, key, better in (("latency", "latency", False), ("TPOT", "tpot", False), ("TTFT", "ttft", True)):
        with_switch, without = table[key]
        ours, theirs = getattr(still, key) / getattr(moving, key), without / with_switch
        least = getattr(still, key) / getattr(floor, key)
        if better:
            ours, theirs, least = 1 / ours, 1 / theirs, 1 / least
        which = "with switching over without" if better else "without switching over with"
        others = {"with at least two encoders": least}
        yield relative("E3", f"{name}, {which}", ours, theirs, ORIGIN, 0.25, others=others, note=note)
    for name, key in (("latency", "latency"), ("TPOT", "tpot"), ("TTFT", "ttft")):
        for label, run, theirs in (("5E1P2D", still, table[key][1]), ("switching", moving, table[key][0])):
            yield relative("E3", f"mean {name}, {label}, s", getattr(run, key), theirs, ORIGIN, 0.25, note=note)


def _roles(run: SwitchRun) -> str:
    return "{}E{}P{}D".format(*run.roles)


# E5

Decision = tuple[tuple[int, int, int], tuple[int, int, int], str | None]
DECISIONS: tuple[Decision, ...] = (
    ((0, 0, 10), (5, 1, 2), "E->D"),
    ((10, 0, 0), (1, 2, 5), "D->E"),
    ((0, 10, 0), (2, 1, 3), "D->P"),
    ((5, 5, 10), (5, 1, 2), None),
    ((4, 5, 10), (5, 1, 2), "E->D"),
    ((0, 0, 0), (5, 1, 2), None),
    ((10, 0, 10), (5, 1, 2), None),
    ((10, 0, 10), (5, 2, 2), "P->E"),
    ((0, 0, 10), (1, 1, 6), None),
    ((0, 0, 10), (3, 3, 2), "E->D"),
)
"""Queues and engines of encode, prefill and decode, and what the published rule decides, worked out by hand."""


def rule() -> Check:
    """E5: decisions of the published rule."""
    roles: tuple[Role, ...] = ("encode", "prefill", "decode")
    found = 0
    for queues, engines, expected in DECISIONS:
        stages = [Stage(role, queues[at], 0, engines[at]) for at, role in enumerate(roles)]
        found += _named(epd_rule(stages)) == expected
    verdict: Verdict = "holds" if found == len(DECISIONS) else "missed"
    note = "the rule as EPD's repository has it; cases worked out by hand"
    return Check("E5", "decisions of the queue rule", found, len(DECISIONS), "EPD's repository", None, "exact", verdict,
                 note=note)  # fmt: skip


def _named(switch: Switch | None) -> str | None:
    return f"{switch.source[0]}->{switch.target[0]}".upper() if switch else None
