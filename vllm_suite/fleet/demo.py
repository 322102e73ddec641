"""`vllm-suite demo`: a real trace and pictures on a prefill and a decode engine, then on one; every token is equal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_suite.fleet.assemble import supervise
from vllm_suite.fleet.console import Console
from vllm_suite.fleet.demo_pictures import demo_requests, pictures_of, takes_pictures
from vllm_suite.fleet.demo_run import DemoFailed, Laps, carry_out
from vllm_suite.fleet.demo_spec import SERVED_NAME, TINY, DemoOptions, demo_fleet, prompt_ids, single_engine
from vllm_suite.fleet.keys import FleetKeys
from vllm_suite.fleet.launch import Launch
from vllm_suite.fleet.process import ask
from vllm_suite.fleet.prompts import Prompt, Scale, build_prompts, fit
from vllm_suite.fleet.replay import Answer, Request, Settings, prepared, send
from vllm_suite.fleet.report import Moved, make_report, print_report
from vllm_suite.fleet.scrape import scrape
from vllm_suite.fleet.supervisor import Supervisor
from vllm_suite.fleet.tiny_media import MediaConfig, make_tiny_media
from vllm_suite.fleet.traces import Trace, TraceError, load_trace
from vllm_suite.router.config import Auth

if TYPE_CHECKING:
    import aiohttp

_TEMPLATE_TOKENS = 64
_WARM_UP_TOKENS = 200


@dataclass(frozen=True)
class _Workload:
    """All requests in order, those of the trace first; `warm_up` are not counted."""

    requests: list[Request]
    pictures: list[Request]
    scale: Scale
    warm_up: list[Request]
    max_tokens: int
    keys: FleetKeys


def run(options: DemoOptions, json_file: Path, argv: list[str]) -> int:
    """The whole demo. 0 where every output is identical and KV moved through NIXL, 2 for a wrong trace, else 1."""
    try:
        trace = load_trace(options.trace, options.requests, options.seed)
    except TraceError as error:
        print(error, file=sys.stderr)
        return 2
    return carry_out(
        lambda: _run(options, trace),
        options.folder,
        json_file,
        print_report,
        "identical outputs, KV blocks moved through NIXL",
        argv=argv,
        seed=options.seed,
    )


async def _run(options: DemoOptions, trace: Trace) -> dict[str, Any]:
    laps = Laps()
    with Console() as console:
        config = MediaConfig("qwen2_5_vl", seed=options.seed, **TINY)
        model = options.model or str(make_tiny_media(options.folder / "tiny-qwen2.5-vl", config))
        fleet = demo_fleet(options, model)
        laps.lap("model")
        console.say(f"starting 1 prefill, 1 decode and the router on {model}; logs in {fleet.local.log_dir}")
        async with supervise(fleet, console.changed) as supervisor:
            console.watch(supervisor.processes)
            await supervisor.start()
            laps.lap("fleet_start")
            work = await _workload(options, trace, model, supervisor)
            also = f" and {len(work.pictures)} with pictures" if work.pictures else ""
            count = len(work.requests) - len(work.pictures)
            console.say(f"replaying {count} requests of {trace.name}{also} through the router")
            answers, moved = await _on_fleet(supervisor, work)
            laps.lap("fleet_replay")
        laps.lap("fleet_stop")
        spec, launches = single_engine(fleet)
        console.say("starting one plain engine for comparison")
        async with Supervisor(launches, spec.local, console.changed) as single:
            console.watch(single.processes)
            await single.start()
            laps.lap("single_start")
            expected = await _on_single(launches[0].url, work)
            laps.lap("single_replay")
        laps.lap("single_stop")
    facts = {
        "model": options.model or "tiny",
        "max_tokens": options.max_tokens,
        "trace": {
            "name": trace.name,
            "length_scale": round(work.scale.length, 6),
            "time_scale": round(work.scale.time, 6),
            "max_prompt_tokens": work.scale.max_tokens,
        },
        "restarts": {p.name: p.restarts for p in supervisor.processes if p.restarts},
        "wall_seconds": laps.total(),
        "commands": [p.launch.shell() for p in supervisor.processes] + [launch.shell() for launch in launches],
    }
    shown = {request.index: pictures_of([request]) for request in work.pictures}
    return make_report(answers, expected, moved, facts, shown)


async def _workload(options: DemoOptions, trace: Trace, model: str, supervisor: Supervisor) -> _Workload:
    """Prompts that fit the window that the instances say they have, and pictures where the model takes them."""
    import aiohttp

    async with aiohttp.ClientSession() as session:
        states = [await ask(session, launch) for launch in _instances(supervisor)]
    windows = [state["max_model_len"] for state in states if state and state.get("max_model_len")]
    if not windows:
        raise DemoFailed("no instance says how long a prompt may be")
    longest = min(windows) - options.max_tokens - _TEMPLATE_TOKENS
    if longest < 2:
        raise DemoFailed(f"--max-tokens {options.max_tokens} leaves no room in a window of {min(windows)} tokens")
    if options.model is None:
        # A third of the window holds nine in ten prompts uncut and keeps two cores within the demo's time.
        longest = min(longest, 1500)
    ids = prompt_ids(options)
    scale = fit(trace, longest, options.duration_s)
    settings = Settings(model=SERVED_NAME, max_tokens=options.max_tokens)
    requests = prepared(build_prompts(trace, scale, ids, options.seed), settings)
    warm_up = prepared(
        [Prompt(-1, 0.0, tuple(ids[7 * i % len(ids)] for i in range(min(_WARM_UP_TOKENS, longest))))], settings
    )
    pictures: list[Request] = []
    if takes_pictures(model):
        pictures = demo_requests(options.max_tokens, len(requests), options.duration_s, options.seed)
        warm_up += demo_requests(options.max_tokens, -len(pictures) - 1, 0.0, options.seed + 1000)
    return _Workload([*requests, *pictures], pictures, scale, warm_up, options.max_tokens, FleetKeys.resolve(Auth()))


async def _on_fleet(supervisor: Supervisor, work: _Workload) -> tuple[list[Answer], Moved]:
    import aiohttp

    router = supervisor.processes[-1].launch
    async with aiohttp.ClientSession() as session:
        await _warm_up(router.url, work, work.keys.client)
        before = await _moved(session, supervisor, work.keys)
        answers = await send(router.url, work.requests, work.max_tokens, key=work.keys.client)
        return answers, (await _moved(session, supervisor, work.keys)).since(before)


async def _on_single(url: str, work: _Workload) -> list[Answer]:
    await _warm_up(url, work, work.keys.upstream)
    return await send(url, work.requests, work.max_tokens, key=work.keys.upstream)


async def _warm_up(url: str, work: _Workload, key: str | None) -> None:
    """Requests that are not counted: first use of kernels, and of the connection between the instances."""
    for answer in await send(url, work.warm_up, work.max_tokens, key=key):
        if answer.error:
            raise DemoFailed(f"a first request failed: {answer.error}")


async def _moved(session: aiohttp.ClientSession, supervisor: Supervisor, keys: FleetKeys) -> Moved:
    decode = [launch for launch in _instances(supervisor) if launch.role == "decode"]
    scrapes = [await scrape(session, launch.url, keys.upstream) for launch in decode]
    router = await scrape(session, supervisor.processes[-1].launch.url, keys.client)
    known = [samples for samples in scrapes if samples is not None]
    if router is None or len(known) != len(decode):
        raise DemoFailed("the metrics of the decode instance or of the router cannot be read")
    return Moved.read(known, router)


def _instances(supervisor: Supervisor) -> Sequence[Launch]:
    return [process.launch for process in supervisor.processes if process.launch.role != "router"]
