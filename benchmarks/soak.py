"""A fleet under load and faults for some minutes: nothing wrong, nothing stuck, nothing kept.

    python benchmarks/soak.py --minutes 20 --seed 1 --json soak.json

`vllm-suite up` runs a fleet of tiny engines on CPU with a router. Clients ask questions whose answers one plain engine
gave before; some leave amid their answer, some send malformed requests, and `vllm bench serve` adds load of its own.
Meanwhile instances and router are killed, ended, stopped and continued, and instances of role `any` change their
roles, as a schedule says that is drawn from the seed alone. Everything stays on the loopback interface.

Exit status 0: every answer that claims to be one is that of the plain engine, every request ended within its deadline
with an answer or an error that says so, memory and open files of every long life are flat, and at the end no request,
KV block or lease is held. 1 where that is not so, 2 for bad arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
from common import arguments, positive, scratch, show_table, write_result
from soak_bench import Bench
from soak_faults import READY_S, Done, Faults, explained
from soak_fleet import View, answers_of_one_engine, fleet_file, running, tiny_model
from soak_load import Client, Question, Tally, questions
from soak_schedule import schedule
from soak_watch import Life, Watch, at_rest, counters

from vllm_suite.fleet.keeper import adopt_orphans

REST_S = 60.0
LONG_S = 600.0
"""In a soak of so many seconds some life of the router and of an instance is long enough to be judged."""


@dataclass(frozen=True)
class Plan:
    """One run. Equal plans have equal faults and ask equal questions.

    Attributes:
        deadline_s: a request without an end by then is stuck; longer than all of the router's deadlines.
        gap_s: least and longest pause between two faults.
    """

    seconds: float
    seed: int
    clients: int = 4
    deadline_s: float = 60.0
    gap_s: tuple[float, float] = (8.0, 20.0)


async def soak(view: View, known: Sequence[Question], plan: Plan, bench: Bench | None = None) -> dict[str, Any]:
    """Load and faults on a running fleet; the report, whose `checks` say what held."""
    names = [one["name"] for one in view.instances()]
    able = [one["name"] for one in view.instances() if one["role"] == "any"]
    events = schedule(plan.seed, plan.seconds, names, able, plan.gap_s)
    tally, ends = Tally(), asyncio.Event()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        start = await at_rest(view, session, REST_S)
        began = time.monotonic()
        watch, faults = Watch(view, began), Faults(view, session, began)
        key = view.keys.client or ""
        clients = [
            Client(number, plan.seed, session, view.router, key, known, tally, plan.deadline_s)
            for number in range(plan.clients)
        ]
        watching = asyncio.create_task(watch.run())
        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(client.run(ends, began))
            load = asyncio.create_task(bench.run(view.router, key, plan.seconds)) if bench else None
            await faults.run(events)
            await asyncio.sleep(max(0.0, plan.seconds - (time.monotonic() - began)))
            ends.set()
        benched = await load if load else None
        seconds = time.monotonic() - began
        back = await whole(view)
        end = await at_rest(view, session, REST_S)
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching  # what ended it earlier is raised here
        counted = await counters(view, session)
    facts = {
        "plan": asdict(plan),
        "seconds": round(seconds, 1),
        "bench_serve": benched,
        "schedule": [event.document() for event in events],
        "held_at_start": start,
        "held_at_end": end,
        "counters": counted,
    }
    log = Path(view.member("router")["log"])
    return conclude(
        tally, faults.done, list(watch.lives.values()), back, await asyncio.to_thread(tracebacks, log), facts
    )


async def whole(view: View) -> bool:
    """Whether every process is ready before long."""
    deadline = time.monotonic() + READY_S
    while any(one["state"] != "ready" for one in view.members()):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.5)
    return True


def tracebacks(log: Path) -> list[str]:
    """What follows "Traceback" in a log, the last line of each."""
    found: list[str] = []
    inside = False
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("Traceback (most recent call last)"):
            inside = True
        elif inside and line and not line.startswith(" "):
            found.append(line[:300])
            inside = False
    return found


def conclude(
    tally: Tally, done: Sequence[Done], lives: Sequence[Life], back: bool, crashes: list[str], facts: dict[str, Any]
) -> dict[str, Any]:
    """The report: `facts` with what is concluded from them and the rest.

    Args:
        back: whether all processes were ready at the end.
        crashes: exceptions in the router's log.
    """
    errors = [record for record in tally.records if record.outcome == "error"]
    outside = [record for record in errors if not explained(done, record.ended_s)]
    ended = [life.document() for life in lives]
    failed = {record.outcome for record in tally.failures()}
    benched = facts["bench_serve"]
    judged = {life.kind for life, row in zip(lives, ended, strict=True) if row["judged"]}
    watched = facts.get("plan", {}).get("seconds", 0.0) < LONG_S or judged == {"router", "instance"}
    checks = {
        "no wrong answer": "wrong" not in failed,
        "no stuck request": "stuck" not in failed and (benched is None or benched["ended"]),
        "every end is clear": "unclear" not in failed,
        "every error is near a fault": not outside,
        "every fault came to its end": all(one.result and not one.result.startswith(("NO ", "NOT ")) for one in done),
        "all processes are back": back,
        "nothing is held at the end": not any(value for row in facts["held_at_end"].values() for value in row.values()),
        "memory and files are flat": watched and all(life["flat"] for life in ended if life["judged"]),
        "no exception in the router's log": not crashes,
    }
    return {
        "ok": all(checks.values()),
        "checks": checks,
        **facts,
        "requests": len(tally.records),
        "outcomes": tally.counts(),
        "slowest_s": round(max((record.ended_s - record.began_s for record in tally.records), default=0.0), 2),
        "errors": [[count, text] for text, count in Counter(record.detail[:120] for record in errors).most_common(12)],
        "errors_outside_faults": [asdict(record) for record in outside],
        "failures": [asdict(record) for record in tally.failures()],
        "events": [one.document() for one in done],
        "lives": ended,
        "router_exceptions": crashes,
    }


def show(report: dict[str, Any]) -> None:
    """The report in a few tables."""
    rows = [[kind, *(str(row.get(name, 0)) for name in OUTCOMES)] for kind, row in sorted(report["outcomes"].items())]
    show_table(f"{report['requests']} requests in {report['seconds']} s", ["kind", *OUTCOMES], rows)
    judged = [life for life in report["lives"] if life["judged"]]
    rows = [
        [life["name"], f"{life['judged_seconds']:.0f}", f"{life['rss_kib_per_min']}", f"{life['files_per_min']}"]
        for life in judged
    ]
    show_table("lives long enough to judge", ["process", "s", "KiB/min", "files/min"], rows)
    kinds = Counter(f"{event['kind']}: {event['result'].split(':')[0]}" for event in report["events"])
    show_table("faults", ["what", "times"], [[name, str(count)] for name, count in sorted(kinds.items())])
    for name, held in report["checks"].items():
        print(f"{'yes' if held else 'NO '}  {name}")


OUTCOMES = ("right", "error", "left", "refused", "wrong", "stuck", "unclear")


async def main_async(args: Any) -> dict[str, Any]:
    """Fleet, reference, load; cancelled by SIGTERM, so that nothing is left."""
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    with contextlib.ExitStack() as stack:
        folder = args.folder or stack.enter_context(scratch("soak-"))
        model = await asyncio.to_thread(tiny_model, folder)
        file = fleet_file(folder, model, args.pools)
        asked = questions(args.seed, args.questions)
        print(f"one plain engine answers {len(asked)} questions", flush=True)
        known = await answers_of_one_engine(folder, file, asked)
        plan = Plan(args.minutes * 60, args.seed, args.clients)
        print(f"starting {args.pools} and the router; logs in {folder}/logs", flush=True)
        async with running(folder, file) as view:
            bench = None if args.no_bench else Bench(folder, model, args.seed)
            return await soak(view, known, plan, bench)


def pools(text: str) -> dict[str, int]:
    """Argument type: `prefill=1,decode=1,any=1`."""
    found = {name: positive(count) for name, _, count in (part.partition("=") for part in text.split(","))}
    if set(found) - {"prefill", "decode", "any"}:
        raise ValueError(text)
    return found


def main() -> int:
    """Entry point."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--minutes", type=float, default=20.0, help="of load (20)")
    parser.add_argument("--seed", type=int, default=0, help="of faults, prompts and clients (0)")
    parser.add_argument("--clients", type=positive, default=4, help="that check every answer (4)")
    parser.add_argument("--questions", type=positive, default=48, help="different ones (48)")
    parser.add_argument("--pools", type=pools, default={"prefill": 1, "decode": 1, "any": 1}, help="instances by role")
    parser.add_argument("--no-bench", action="store_true", help="without `vllm bench serve` beside the clients")
    parser.add_argument("--folder", type=Path, help="for logs, which are kept then")
    args = parser.parse_args()
    if args.quick:
        args.minutes = min(args.minutes, 2.0)
    if not 0.2 <= args.minutes <= 24 * 60:
        parser.error("--minutes must be between 0.2 and 1440")
    load_before = os.getloadavg()
    adopt_orphans()
    report = asyncio.run(main_async(args))
    show(report)
    write_result(args.json, "soak", report | {"seed": args.seed}, load_before)
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
