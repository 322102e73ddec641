"""E3 and E5: what EPD's role switching wins, and the rule by which it decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_suite.planner.plan import Role
from vllm_suite.planner.simulator.fleet import FleetRun, simulate_plan
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.simulator.switching import Stage, Switch, Switching, epd_rule
from vllm_suite.planner.validation.check import Check, Verdict, relative
from vllm_suite.planner.validation.epd_fleet import (
    ENCODERS,
    ORIGIN,
    Constants,
    epd,
    fit,
    pictures,
    points,
    poisson,
    said,
    setting,
)

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


def switched(
    constants: Constants,
    decode: float,
    how: Switching | None,
    *,
    batch: int = DECODE_BATCH,
    arrivals: Sequence[float] | None = None,
) -> SwitchRun:
    """100 requests of one picture at 3/s: 10 of 50 tokens, then 90 of 500, on 5E1P2D.

    Args:
        arrivals: in seconds; evenly spaced by default, as the paper does not say how they come.
    """
    found: list[Served] = []
    times = [n / ARRIVALS for n in range(REQUESTS)] if arrivals is None else arrivals
    requests = (pictures(n, at, 1, 50 if n < 10 else 500) for n, at in enumerate(times))
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
    constants = fit(points(irp_table["images"], rows, (2, 8)))
    decode = tables["table5_optimizer"]["tpot"][1]
    still = switched(constants, decode, None)
    moving = switched(constants, decode, Switching(epd_rule, every=5.0))
    floor = switched(constants, decode, Switching(epd_rule, every=5.0, floor={"encode": 2}))
    drawn = poisson(ARRIVALS, REQUESTS)
    drawn_still = switched(constants, decode, None, arrivals=drawn)
    drawn_moving = switched(constants, decode, Switching(epd_rule, every=5.0), arrivals=drawn)
    note = (
        f"encode, prefill and the rest from table 4 ({said(constants)}); a decode step {decode} s, the shorter TPOT of"
        f" table 5; {DECODE_BATCH} requests in a decode batch and one in the others, as EPD's repository starts them;"
        " arrivals evenly spaced; a switch 0.7 s, decisions every 5 s; nothing fitted to table 6"
    )
    why = (
        "; the published rule leaves each stage one engine: the fourth encoder goes too, at 25 s, and the last one"
        " encodes 2.3 pictures a second of the 3 that come, which is TTFT's ratio; without switching table 6 has the"
        " first token of one picture 0.4 s after table 4's of two"
    )
    what = "roles at the end, 5E1P2D at first"
    verdict: Verdict = "holds" if moving.roles == (2, 1, 5) else "missed"
    told = {"with at least two encoders": _roles(floor), "Poisson arrivals": _roles(drawn_moving)}
    yield Check("E3", what, _roles(moving), "2E1P5D", ORIGIN, None, "exact", verdict, told, note + why)
    for name, key, better in (("latency", "latency", False), ("TPOT", "tpot", False), ("TTFT", "ttft", True)):
        with_switch, without = table[key]
        ours, theirs = getattr(still, key) / getattr(moving, key), without / with_switch
        least = getattr(still, key) / getattr(floor, key)
        drawn_ratio = getattr(drawn_still, key) / getattr(drawn_moving, key)
        if better:
            ours, theirs, least, drawn_ratio = 1 / ours, 1 / theirs, 1 / least, 1 / drawn_ratio
        which = "with switching over without" if better else "without switching over with"
        others = {"with at least two encoders": least, "Poisson arrivals": drawn_ratio}
        told_why = note + why if better else note
        yield relative("E3", f"{name}, {which}", ours, theirs, ORIGIN, 0.25, others=others, note=told_why)
    for name, key in (("latency", "latency"), ("TPOT", "tpot"), ("TTFT", "ttft")):
        for label, run, theirs in (("5E1P2D", still, table[key][1]), ("switching", moving, table[key][0])):
            yield relative("E3", f"mean {name}, {label}, s", getattr(run, key), theirs, ORIGIN, 0.25, note=note)


def _roles(run: SwitchRun) -> str:
    return "{}E{}P{}D".format(*run.roles)


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
