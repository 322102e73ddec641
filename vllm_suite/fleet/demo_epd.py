"""`vllm-suite demo-epd`: pictures encoded on instances of their own, answers equal to one engine's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_suite.fleet.assemble import supervise
from vllm_suite.fleet.console import Console
from vllm_suite.fleet.demo_epd_report import Counts, Phase, make_report, print_report, settled
from vllm_suite.fleet.demo_epd_spec import (
    ENCODERS,
    TOWER,
    EpdOptions,
    Workload,
    epd_fleet,
    router_over,
    workload,
)
from vllm_suite.fleet.demo_pictures import pictures_of
from vllm_suite.fleet.demo_run import DemoFailed, Laps, carry_out
from vllm_suite.fleet.demo_spec import single_engine
from vllm_suite.fleet.keys import FleetKeys
from vllm_suite.fleet.launch import Launch
from vllm_suite.fleet.replay import Request, send
from vllm_suite.fleet.scrape import Samples, scrape
from vllm_suite.fleet.supervisor import Supervisor
from vllm_suite.fleet.tiny_media import make_tiny_media
from vllm_suite.fleet.tiny_media.config import MediaConfig
from vllm_suite.router.config import Auth

if TYPE_CHECKING:
    import aiohttp

_TIMED = 1000  # index of the timed request; its rounds are compared with one answer


def run(options: EpdOptions, json_file: Path, argv: list[str]) -> int:
    """The whole demo. 0 where all that `make_report` asks for holds, else 1."""
    claim = "identical outputs, pictures encoded on their own instances"
    return carry_out(
        lambda: _run(options), options.folder, json_file, print_report, claim, argv=argv, seed=options.seed
    )


async def _run(options: EpdOptions) -> dict[str, Any]:
    laps, load = Laps(), os.getloadavg()
    with Console() as console:
        config = MediaConfig("qwen2_5_vl", seed=options.seed, **TOWER)
        model = options.model or str(make_tiny_media(options.folder / "tiny-qwen2.5-vl", config))
        fleet, work = epd_fleet(options, model), workload(options)
        laps.lap("model")
        console.say(f"starting {ENCODERS} encoders, 1 prefill, 1 decode and the router; logs in {fleet.local.log_dir}")
        async with supervise(fleet, console.changed) as supervisor:
            console.watch(supervisor.processes)
            await supervisor.start()
            launches = [process.launch for process in supervisor.processes]
            # Without the second encoder; nothing else has to be started again for the comparison.
            few = [launch for launch in launches[:-1] if launch is not launches[1]]
            spec, second = router_over(fleet, few, "one-encoder", fleet.router.port + 1)
            async with Supervisor([second], spec.local, console.changed, members=len(few)) as small:
                await small.start()
                laps.lap("fleet_start")
                console.say("sending pictures, the same ones again, then new ones with one encoder and with two")
                phases = await _Run(launches, second, work, options.max_tokens).phases()
                laps.lap("fleet_replay")
        laps.lap("fleet_stop")
        plain, single = single_engine(fleet)
        console.say("starting one plain engine for comparison")
        async with Supervisor(single, plain.local, console.changed) as one:
            console.watch(one.processes)
            await one.start()
            laps.lap("single_start")
            requests = [*work.mixed, *work.repeated, work.round(_TIMED, "single")]
            answers = await send(single[0].url, requests, options.max_tokens, key=FleetKeys.resolve(Auth()).upstream)
            laps.lap("single_replay")
        laps.lap("single_stop")
    facts = {
        "model": options.model or "tiny",
        "max_tokens": options.max_tokens,
        "restarts": {p.name: p.restarts for p in supervisor.processes if p.restarts},
        "wall_seconds": laps.total(),
        # Two encoders cannot be faster than one where something else has the cores.
        "load_average_before": list(load),
        "cores": len(os.sched_getaffinity(0)),
        "commands": [launch.shell() for launch in (*launches, second, *single)],
    }
    return make_report(phases, {answer.index: answer for answer in answers}, facts)


class _Run:
    """The phases, through the fleet's own router and through one that knows a single encoder."""

    def __init__(self, launches: Sequence[Launch], second: Launch, work: Workload, max_tokens: int) -> None:
        self._instances, self._both, self._one = launches[:-1], launches[-1], second
        self._work = work
        self._max_tokens = max_tokens
        self._keys = FleetKeys.resolve(Auth())

    async def phases(self) -> list[Phase]:
        """Every phase in turn."""
        import aiohttp

        async with aiohttp.ClientSession() as session:
            for router in (self._both, self._one):
                # The first request opens the connections between the instances; it is not counted.
                await self._warm_up(router)
            return [
                await self._phase(session, "mixed", self._both, self._work.mixed),
                await self._phase(session, "repeated", self._both, self._work.repeated),
                *await self._timed(session),
            ]

    async def _timed(self, session: aiohttp.ClientSession) -> list[Phase]:
        """The same pictures with one encoder and with two, in turn; each time new to every cache."""
        parts: dict[str, list[Phase]] = {"one encoder": [], "two encoders": []}
        for number in range(self._work.rounds):
            for name, router in (("one encoder", self._one), ("two encoders", self._both)):
                request = self._work.round(_TIMED, f"{name}-{number}")
                parts[name].append(await self._phase(session, name, router, [request]))
        return [_joined(phases) for phases in parts.values()]

    async def _phase(
        self, session: aiohttp.ClientSession, name: str, router: Launch, requests: Sequence[Request]
    ) -> Phase:
        before = await settled(lambda: self._counts(session))
        first = min(request.arrival_s for request in requests)
        shifted = [replace(request, arrival_s=request.arrival_s - first) for request in requests]
        answers = await send(router.url, shifted, self._max_tokens, key=self._keys.client)
        counts = (await settled(lambda: self._counts(session))).since(before)
        encoders = 1 if router is self._one else ENCODERS
        return Phase(name, encoders, answers, pictures_of(requests), counts)

    async def _warm_up(self, router: Launch) -> None:
        request = self._work.round(-1, f"warm-up of {router.name}")
        for answer in await send(router.url, [request], self._max_tokens, key=self._keys.client):
            if answer.error:
                raise DemoFailed(f"the first request through {router.name} failed: {answer.error}")

    async def _counts(self, session: aiohttp.ClientSession) -> Counts:
        keys = self._keys
        found = {launch.name: await scrape(session, launch.url, keys.upstream) for launch in self._instances}
        found |= {one.name: await scrape(session, one.url, keys.client) for one in (self._both, self._one)}
        silent = [name for name, samples in found.items() if samples is None]
        if silent:
            raise DemoFailed(f"the metrics of {', '.join(silent)} cannot be read")
        known: dict[str, Samples] = {name: samples for name, samples in found.items() if samples is not None}
        encoders = {one.name: known[one.name] for one in self._instances if one.role == "encode"}
        consumers = [known[one.name] for one in self._instances if one.role != "encode"]
        return Counts.read(encoders, consumers, [known[self._both.name], known[self._one.name]])


def _joined(phases: Sequence[Phase]) -> Phase:
    """Rounds of one kind as one phase."""
    first = phases[0]
    return Phase(
        first.name,
        first.encoders,
        [answer for phase in phases for answer in phase.answers],
        sum(phase.pictures for phase in phases),
        Counts.sum([phase.counts for phase in phases]),
    )
