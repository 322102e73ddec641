"""A running fleet as the tests address it, and the file it is started from."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from vllm_suite.fleet.tiny_engine import tiny_engine, tiny_transfer

START_TIMEOUT_S = 300.0
MODEL = "tiny"
KEY = "client-key"
CONTROL_KEY = "control-key"
ENGINE_KEY = "engine-key"

SUITE = {"pull_timeout_s": 4.0, "claim_timeout_s": 0.5, "lease_s": 4.0, "peer_retry_s": 0.5, "peer_retry_max_s": 1.0}


# What no request keeps and what any may take: the tests with Prometheus see the alerts of the first kind.
TARGETS: dict[str, Any] = {
    "slo": {"ttft": "0.001ms", "tpot": "60s"},
    "predicted": {
        "rate": 1000.0,
        "error": 0.25,
        "source": "roofline",
        "ttft": {"p50": "0.001ms", "p99": "0.002ms", "p99_high": "0.003ms"},
        "tpot": {"p50": "30s", "p99": "60s"},
    },
}


def run_of_ports(count: int) -> int:
    """First of ``count`` consecutive free ports, below those the system hands out by itself."""
    for _ in range(100):
        first = random.randrange(20_000, 32_000)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise RuntimeError("no run of free ports found")


def prompt(tokens: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(16, 500) for _ in range(tokens)]


def request(text: list[int] | str, max_tokens: int = 8, **fields: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": text,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **fields,
    }


def shared_memory(pids: Iterable[int]) -> set[str]:
    """Names under /dev/shm that the processes have mapped now.

    By inode: glibc maps a semaphore under a temporary name before it links the one that stays.
    """
    inodes: set[int] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
            inodes.update(int(line.split()[4]) for line in lines if "/dev/shm/" in line)
    with os.scandir("/dev/shm") as entries:
        return {entry.name for entry in entries if entry.inode() in inodes}


_SEEN: dict[int, set[str]] = {}


def note_shared_memory(process: subprocess.Popen[bytes]) -> None:
    """Remember what the fleet's own processes have mapped, before some of them end.

    /dev/shm is the machine's: what else appears there meanwhile belongs to other programs.
    """
    _SEEN.setdefault(process.pid, set()).update(shared_memory(descendants(process.pid)))


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> dict[str, Any]:
        value = json.loads(self.text)
        assert isinstance(value, dict)
        return value

    @property
    def tokens(self) -> list[int]:
        assert self.status == 200, (self.status, self.text)
        tokens: list[int] = self.json["choices"][0]["token_ids"]
        return tokens


class Fleet:
    """The running fleet, addressed by role, or where a role has several instances by "encode-0" and so on."""

    def __init__(self, process: subprocess.Popen[bytes], log_dir: Path, session: aiohttp.ClientSession) -> None:
        self.process = process
        self.log_dir = log_dir
        self.session = session

    def member(self, role: str) -> dict[str, Any]:
        state = json.loads((self.log_dir / "fleet.json").read_text())
        (found,) = [p for p in state["processes"] if p["role"] == role or p["name"].endswith("-" + role)]
        assert isinstance(found, dict)
        return found

    def url(self, role: str) -> str:
        return str(self.member(role)["url"])

    def signal(self, role: str, sig: int) -> None:
        """Send ``sig`` to every process of the instance, workers included."""
        member = self.member(role)
        assert member["state"] == "ready", f"the process ids of {role} are of another life: {member}"
        note_shared_memory(self.process)
        for pid in member["pids"]:
            for victim in [pid, *descendants(pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, sig)

    def freeze(self, role: str) -> None:
        self.signal(role, signal.SIGSTOP)

    def thaw(self, role: str) -> None:
        self.signal(role, signal.SIGCONT)

    async def post(
        self, body: Any, role: str = "router", path: str = "/v1/completions", timeout_s: float = 120.0, **headers: str
    ) -> Answer:
        key = KEY if role == "router" else ENGINE_KEY
        all_headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", **headers}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with self.session.post(self.url(role) + path, data=data, headers=all_headers, timeout=timeout) as r:
            return Answer(r.status, {k.lower(): v for k, v in r.headers.items()}, await r.text())

    async def get(self, role: str, path: str, key: str | None = None) -> Answer:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with self.session.get(self.url(role) + path, headers=headers) as r:
            return Answer(r.status, {k.lower(): v for k, v in r.headers.items()}, await r.text())

    async def metric(self, role: str, name: str, **labels: str) -> float:
        """Sum of the samples of that name whose labels match."""
        key = KEY if role == "router" else ENGINE_KEY
        text = (await self.get(role, "/metrics", key)).text
        total = 0.0
        for line in text.splitlines():
            if line.startswith((name + "{", name + " ")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total

    async def idle(self, timeout_s: float = 30.0, roles: Sequence[str] = ("prefill", "decode")) -> None:
        """Nothing runs, nothing waits and no KV block is held on any instance, within the deadline."""
        deadline = time.monotonic() + timeout_s
        while True:
            now = {
                f"{role} {name}": await self.metric(role, f"vllm:{name}")
                for role in roles
                for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            }
            if not any(now.values()):
                return
            assert time.monotonic() < deadline, f"still busy: {now}"
            await asyncio.sleep(0.2)
            # An idle engine reports nothing; a request makes it say how many blocks it holds.
            for role in roles:
                await self.post(request(prompt(4, 1), 2), role)

    async def epoch(self, role: str) -> str | None:
        """The epoch of the instance of that role, as far as the router knows one that is ready."""
        with contextlib.suppress(aiohttp.ClientError, KeyError, TimeoutError):
            members = (await self.get("router", "/suite/v1/instances", CONTROL_KEY)).json["instances"]
            for member in members:
                if (member["role"] == role or member["instance_id"].endswith("-" + role)) and member["ready"]:
                    return str(member["epoch"])
        return None

    async def ready(self, role: str, former_epoch: str | None = None, timeout_s: float = 180.0) -> None:
        """The router counts the instance of that role as ready, in another life than ``former_epoch``.

        So does the supervisor, which asks on its own: only then are the process ids that it wrote of this life.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            epoch = await self.epoch(role)
            if epoch is not None and epoch != former_epoch and self.member(role)["state"] == "ready":
                return
            assert time.monotonic() < deadline, f"no ready {role} after {timeout_s:.0f} s"
            await asyncio.sleep(0.25)


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def spec(model: Path, log_dir: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "served_model_name": MODEL,
        "engine": {**tiny_engine(), "enable_prefix_caching": False, "additional_config": {}},
        "env": {"VLLM_SUITE_FLEET_KEY": "fleet-key"},
        "pools": {role: {"engine": {"kv_transfer_config": transfer(role)}} for role in ("prefill", "decode")},
        "router": {
            "port": run_of_ports(1),
            "disaggregation": {"min_prompt_tokens": 0, "max_cached_fraction": 1.0},
            "timeouts": {"prefill_s": 6.0, "connect_s": 1.0},
            "auth": {"api_keys": [KEY], "upstream_api_key": ENGINE_KEY, "control_key": CONTROL_KEY},
        },
        "local": {
            "first_port": run_of_ports(2),
            "first_side_channel_port": run_of_ports(2),
            "log_dir": str(log_dir),
            "device": "cpu",
            "restart": {"first_delay": "100ms"},
        },
    }


def transfer(role: str) -> dict[str, Any]:
    return tiny_transfer(role, SUITE)


@contextlib.contextmanager
def running(folder: Path, fleet_spec: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """Start the fleet with ``vllm-suite up``; afterwards check that nothing of it is left."""
    path, answer = folder / "fleet.yaml", folder / "up.json"
    path.write_text(yaml.safe_dump(fleet_spec))
    with (folder / "up.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm_suite.cli.main", "up", str(path), "--json", str(answer)],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    members: list[int] = []
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answer.exists():
            assert process.poll() is None, (folder / "up.log").read_text()[-4000:]
            assert time.monotonic() < deadline, (folder / "up.log").read_text()[-4000:]
            time.sleep(0.25)
        yield process
    finally:
        members = descendants(process.pid)
        note_shared_memory(process)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    time.sleep(0.5)
    left = [pid for pid in members if Path(f"/proc/{pid}").exists()]
    assert not left, f"processes left behind: {left}"
    assert process.returncode == 0
    left_behind = {name for name in _SEEN.pop(process.pid) if Path("/dev/shm", name).exists()}
    assert not left_behind, f"shared memory left behind: {left_behind}"
