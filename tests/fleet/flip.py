"""A load whose mix flips from long prompts to long answers, against a fleet whose instances can change their roles."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from harness import CONTROL_KEY, KEY, Fleet, prompt, request, run_of_ports, spec, transfer
from prometheus_client import CollectorRegistry

from vllm_suite.fleet.spec import FleetSpec
from vllm_suite.roles.client import Access, NoAnswer, look
from vllm_suite.roles.controller import Controller
from vllm_suite.roles.follow import rule_of

NAMES = ("any-0", "any-1", "any-2")
FIXED = {"any-0": "prefill", "any-1": "prefill", "any-2": "decode"}
"""What suits the first mix. Of a fleet with fixed roles the second mix has one instance to decode on."""

SEVERAL = 6
"""Different prompts of a mix."""

_SWITCH_S = 150.0
_REQUEST_S = 300.0


@dataclass(frozen=True)
class Mix:
    """Tokens of prompt and answer."""

    name: str
    prompt: int
    output: int

    def body(self, index: int) -> dict[str, Any]:
        text = prompt(self.prompt, 7000 + self.prompt + index % SEVERAL)
        return request(text, self.output, stream=True, stream_options={"include_usage": False})


PREFILL = Mix("prefill-heavy", 1500, 4)
DECODE = Mix("decode-heavy", 40, 160)


def flip_spec(model: Path, log_dir: Path, roles: dict[str, Any]) -> dict[str, Any]:
    """Three instances of role any; `roles` beside the limits."""
    wanted = spec(model, log_dir)
    wanted["engine"] |= {"max_num_seqs": 8, "max_num_batched_tokens": 2048}
    wanted["pools"] = {"any": {"replicas": 3, "engine": {"kv_transfer_config": transfer("any")}}}
    limits = {"prefill": {"max_num_seqs": 2}, "decode": {"max_num_seqs": 4, "max_num_batched_tokens": 256}}
    wanted["roles"] = {"limits": limits, **roles}
    # Short prompts go straight to decode, as they do by default.
    wanted["router"]["disaggregation"] = {"min_prompt_tokens": 256, "max_cached_fraction": 1.0}
    wanted["router"]["timeouts"] = {"prefill_s": _REQUEST_S, "connect_s": 2.0}
    wanted["router"]["limits"] = {"wait_for_instance_s": 30.0}
    wanted["local"] |= {"first_port": run_of_ports(3), "first_side_channel_port": run_of_ports(3)}
    return wanted


@dataclass
class Answer:
    """One request: seconds after its arrival, and whether its tokens were those it has alone."""

    mix: str
    arrived: float
    ttft: float
    latency: float
    right: bool
    error: str | None = None


@dataclass
class Run:
    """One load through the fleet."""

    answers: list[Answer] = field(default_factory=list)
    moves: list[dict[str, Any]] = field(default_factory=list)

    def of(self, mix: Mix, since: float = 0.0) -> list[Answer]:
        return [one for one in self.answers if one.mix == mix.name and one.arrived >= since]


async def ask(fleet: Fleet, mix: Mix, index: int, url: str) -> tuple[list[int], float, float]:
    """The tokens, and the seconds to the first of them and to the end. Raises RuntimeError for any other answer."""
    began, first = time.perf_counter(), math.nan
    tokens: list[int] = []
    ended = False
    timeout = aiohttp.ClientTimeout(total=_REQUEST_S)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with fleet.session.post(
        url + "/v1/completions", json=mix.body(index), headers=headers, timeout=timeout
    ) as answer:
        if answer.status != 200:
            raise RuntimeError(f"HTTP {answer.status}: {(await answer.text())[:300]}")
        async for line in answer.content:
            data = line.removeprefix(b"data: ").strip()
            if data == b"[DONE]":
                ended = True
            elif data.startswith(b"{"):
                chunk = json.loads(data)
                if "error" in chunk:
                    raise RuntimeError(f"the stream ended with {chunk['error']}")
                for choice in chunk["choices"]:
                    tokens += choice.get("token_ids") or []
                if tokens and math.isnan(first):
                    first = time.perf_counter() - began
    if not ended or len(tokens) != mix.output:
        raise RuntimeError(f"{len(tokens)} of {mix.output} tokens, ended: {ended}")
    return tokens, first, time.perf_counter() - began


async def alone(
    fleet: Fleet, mixes: Sequence[Mix], warm: bool = True
) -> dict[tuple[str, int], tuple[list[int], float, float]]:
    """What each prompt is answered on an idle fleet, the second time it is asked; `warm` False: the first."""
    found = {}
    for mix in mixes:
        for index in range(SEVERAL):
            if warm:
                await ask(fleet, mix, index, fleet.url("router"))
            found[mix.name, index] = await ask(fleet, mix, index, fleet.url("router"))
    return found


async def capacity(fleet: Fleet, mix: Mix, requests: int) -> float:
    """Requests a second, when so many come at once."""
    began = time.perf_counter()
    await asyncio.gather(*(ask(fleet, mix, index, fleet.url("router")) for index in range(requests)))
    return requests / (time.perf_counter() - began)


async def load(
    fleet: Fleet,
    phases: Sequence[tuple[Mix, float, int]],
    expected: dict[tuple[str, int], tuple[list[int], float, float]],
    seed: int,
) -> Run:
    """Poisson arrivals, of each phase at its rate and for so many requests, one phase after the other."""
    rng, run, tasks = random.Random(seed), Run(), []
    began = time.perf_counter()
    url = fleet.url("router")

    async def one(mix: Mix, index: int) -> None:
        arrived = time.perf_counter() - began
        try:
            tokens, first, latency = await ask(fleet, mix, index, url)
        except (RuntimeError, aiohttp.ClientError, TimeoutError) as error:
            run.answers.append(Answer(mix.name, arrived, math.nan, math.nan, False, f"{type(error).__name__}: {error}"))
            return
        right = tokens == expected[mix.name, index % SEVERAL][0]
        run.answers.append(Answer(mix.name, arrived, first, latency, right))

    due = 0.0
    for mix, rate, count in phases:
        for index in range(count):
            due += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due - (time.perf_counter() - began)))
            tasks.append(asyncio.create_task(one(mix, index)))
    await asyncio.gather(*tasks)
    return run


class Steady:
    """So many clients that ask for one mix, each one request after the other, as an async context manager.

    However fast the machine is, all of them wait or run: what does not fit into one instance is a queue there.
    `arrived` of an answer is on the clock of `time.perf_counter`.
    """

    def __init__(
        self,
        fleet: Fleet,
        mix: Mix,
        clients: int,
        expected: dict[tuple[str, int], tuple[list[int], float, float]],
    ) -> None:
        self.mix = mix
        self.clients = clients
        self.answers: list[Answer] = []
        self._fleet = fleet
        self._expected = expected
        self._turns = itertools.count()
        self._tasks: list[asyncio.Task[None]] = []
        self._ends = False

    async def _client(self) -> None:
        url = self._fleet.url("router")
        while not self._ends:
            index, arrived = next(self._turns), time.perf_counter()
            try:
                tokens, first, latency = await ask(self._fleet, self.mix, index, url)
            except (RuntimeError, aiohttp.ClientError, TimeoutError) as error:
                text = f"{type(error).__name__}: {error}"
                self.answers.append(Answer(self.mix.name, arrived, math.nan, math.nan, False, text))
                continue
            right = tokens == self._expected[self.mix.name, index % SEVERAL][0]
            self.answers.append(Answer(self.mix.name, arrived, first, latency, right))

    async def __aenter__(self) -> Steady:
        self._tasks = [asyncio.create_task(self._client()) for _ in range(self.clients)]
        return self

    async def __aexit__(self, *error: object) -> None:
        # Every request is answered: none is lost at the end of a load.
        self._ends = True
        await asyncio.gather(*self._tasks)

    def since(self, moment: float) -> list[Answer]:
        """Answers to what was asked after that moment, in the order in which they came."""
        return [one for one in self.answers if one.arrived >= moment]

    async def some(self, count: int, timeout_s: float = 120.0) -> list[Answer]:
        """The next so many answers to requests that are asked from now on."""
        began = time.perf_counter()
        while len(found := self.since(began)) < count:
            assert time.perf_counter() - began < timeout_s, f"{len(found)} answers in {timeout_s:g} s"
            await asyncio.sleep(0.05)
        return found

    async def inside(self, target: Slowest, count: int, timeout_s: float = 120.0) -> Slowest:
        """Wait until `count` answers in a row, asked from now on, are inside the target; the slowest of those."""
        began = time.perf_counter()
        while True:
            found = self.since(began)
            last = slowest(found[-count:]) if len(found) >= count else None
            if last is not None and last.inside(target):
                return last
            assert time.perf_counter() - began < timeout_s, f"{self.mix.name}: {last}, wanted {target}"
            await asyncio.sleep(0.05)


@dataclass(frozen=True)
class Slowest:
    """Of some answers: seconds to the first token and to the last."""

    ttft: float
    latency: float

    def times(self, slack: float) -> Slowest:
        return Slowest(slack * self.ttft, slack * self.latency)

    def inside(self, target: Slowest) -> bool:
        return self.ttft <= target.ttft and self.latency <= target.latency


def slowest(answers: Sequence[Answer]) -> Slowest:
    """The 99th percentile of less than a hundred answers. All of them have to be right."""
    assert all(one.right for one in answers), [one for one in answers if not one.right]
    return Slowest(max(one.ttft for one in answers), max(one.latency for one in answers))


async def become(fleet: Fleet, wanted: dict[str, int], timeout_s: float = 120.0) -> None:
    """Wait until the instances have these roles and take work in them."""
    began, found = time.perf_counter(), None
    while True:
        with contextlib.suppress(NoAnswer):
            seen, troubles = await look(fleet.session, access(fleet))
            found = {role: sum(one.role == role and one.ready for one in seen) for role in wanted}
            if not troubles and found == wanted:
                return
        assert time.perf_counter() - began < timeout_s, f"{found} after {timeout_s:g} s, wanted {wanted}"
        await asyncio.sleep(0.1)


async def switch(fleet: Fleet, name: str, target: str) -> dict[str, Any]:
    """Switch one instance by hand and wait for the end; its report, or {} where it has that role."""
    headers = {"Authorization": f"Bearer {CONTROL_KEY}"}
    url = fleet.url(name) + "/suite/v1/role"
    deadline = time.monotonic() + _SWITCH_S
    while True:
        now = (await fleet.get(name, "/suite/v1/role", CONTROL_KEY)).json
        if now["phase"] == "serving":
            break
        assert time.monotonic() < deadline, now
        await asyncio.sleep(0.1)
    body = {"role": target, "epoch": now["epoch"], "role_epoch": now["role_epoch"]}
    async with fleet.session.post(url, json=body, headers=headers) as answer:
        said = await answer.json()
    if said["outcome"] == "noop":
        return {}
    assert said["outcome"] == "begun", said
    while (now := (await fleet.get(name, "/suite/v1/role", CONTROL_KEY)).json)["last"]["outcome"] is None:
        assert time.monotonic() < deadline, now
        await asyncio.sleep(0.02)
    last: dict[str, Any] = now["last"]
    assert last["outcome"] == "switched", now
    return last


async def arrange(fleet: Fleet, roles: dict[str, str]) -> list[dict[str, Any]]:
    """Give every instance a role, and wait until the router knows. The reports of the switches."""
    # Decode first: somebody always has to take whole requests.
    order = sorted(roles.items(), key=lambda pair: pair[1] != "decode")
    reports = [report for name, role in order if (report := await switch(fleet, name, role))]
    for _ in range(200):
        rows = (await fleet.get("router", "/suite/v1/instances", CONTROL_KEY)).json["instances"]
        known = {row["instance_id"].split("-", 1)[1]: (row["role"], row["ready"]) for row in rows}
        if known == {name: (role, True) for name, role in roles.items()}:
            return reports
        await asyncio.sleep(0.1)
    raise AssertionError(f"the router does not know {roles}: {known}")


async def roles_now(fleet: Fleet) -> dict[str, int]:
    """Instances by role."""
    seen, troubles = await look(fleet.session, access(fleet))
    assert not troubles, troubles
    return {role: sum(one.role == role for one in seen) for role in ("prefill", "decode")}


def access(fleet: Fleet) -> Access:
    return Access(fleet.url("router"), CONTROL_KEY, CONTROL_KEY)


class Controlled:
    """The controller beside a run, as an async context manager; `moves` are the switches that it asked for."""

    def __init__(self, fleet: Fleet, wanted: dict[str, Any]) -> None:
        self.spec = FleetSpec.model_validate(wanted)
        self.registry = CollectorRegistry()
        self.moves: list[dict[str, Any]] = []
        self._fleet = fleet
        self._controller = Controller(self.spec.roles, access(fleet), self.registry, rule_of(self.spec))
        self._task: asyncio.Task[None] | None = None

    async def _run(self) -> None:
        began = time.perf_counter()
        while True:
            move = await self._controller.once(self._fleet.session)
            if move is not None:
                at = round(time.perf_counter() - began, 2)
                self.moves.append({"at": at, "instance": move.instance.instance_id, "source": move.instance.role,
                                   "target": move.target})  # fmt: skip
            await asyncio.sleep(self.spec.roles.every)

    async def __aenter__(self) -> Controlled:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
