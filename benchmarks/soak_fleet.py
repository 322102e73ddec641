"""The fleet of a soak: the file it is started from, its processes, and what one plain engine answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
from soak_load import MODEL, Question

from vllm_suite.fleet import keeper
from vllm_suite.fleet.demo_spec import free_ports, single_engine
from vllm_suite.fleet.keys import FleetKeys
from vllm_suite.fleet.spec import FleetSpec
from vllm_suite.fleet.state_file import write_atomically
from vllm_suite.fleet.supervisor import Supervisor
from vllm_suite.fleet.tiny import make_tiny_model
from vllm_suite.fleet.tiny_engine import tiny_engine, tiny_transfer

START_S = 400.0
_SUITE = {"pull_timeout_s": 4.0, "claim_timeout_s": 0.5, "lease_s": 5.0, "peer_retry_s": 0.5, "peer_retry_max_s": 2.0}

FLAT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""vLLM on CPU grows by itself with every new number of tokens in a step: oneDNN keeps up to 1,024 compiled primitives,
and malloc the holes between what it has given away. With both bounded a plain engine is flat, and so has ours to be."""


@dataclass(frozen=True)
class View:
    """A running fleet of `vllm-suite up`, by the folder of its state, with the keys that open it."""

    log_dir: Path
    keys: FleetKeys
    up: int  # the process id of `up`

    def members(self) -> list[dict[str, Any]]:
        """What the supervisor last wrote of each process."""
        state = json.loads((self.log_dir / "fleet.json").read_text())
        found = state["processes"]
        assert isinstance(found, list)
        return found

    def member(self, name: str) -> dict[str, Any]:
        """One of them, the router also as "router". Raises KeyError."""
        for one in self.members():
            if one["name"] == name or one["role"] == name == "router":
                return one
        raise KeyError(name)

    def processes(self, name: str) -> list[int]:
        """Ids of the processes of a member that is ready, its own first; [] while it is not.

        Only ids below this fleet's own supervisor are given: a number may be anybody's by now.
        """
        one = self.member(name)
        if one["state"] != "ready" or not one["pids"]:
            return []
        mine = set(keeper.descendants(self.up))
        found = [pid for pid in one["pids"] if pid in mine]
        return list(dict.fromkeys(p for pid in found for p in (pid, *keeper.descendants(pid)) if p in mine))

    @property
    def router(self) -> str:
        """Where clients ask."""
        return str(self.member("router")["url"])

    def instances(self) -> list[dict[str, Any]]:
        """Members that are no router."""
        return [one for one in self.members() if one["role"] != "router"]


def fleet_file(folder: Path, model: Path, pools: dict[str, int]) -> dict[str, Any]:
    """A fleet on CPU whose every wait is short beside the deadline of a client.

    Args:
        pools: number of instances by role.
    """
    count = sum(pools.values())
    first = free_ports(2 * count + 1)
    return {
        "name": "soak",
        "model": str(model),
        "served_model_name": MODEL,
        "engine": tiny_engine(),
        "env": {"HF_HUB_OFFLINE": "1", "VLLM_SUITE_FLEET_KEY": secrets.token_hex(16), **FLAT},
        "pools": {
            role: {"replicas": number, "engine": {"kv_transfer_config": tiny_transfer(role, _SUITE)}}
            for role, number in pools.items()
        },
        "roles": {"limits": {"decode": {"max_num_batched_tokens": 512}, "prefill": {"max_num_seqs": 4}}},
        "router": {
            "port": first,
            "disaggregation": {"min_prompt_tokens": 0, "max_cached_fraction": 1.0},
            "timeouts": {
                "connect_s": 1.0, "prefill_s": 8.0, "first_byte_s": 20.0, "idle_s": 15.0, "client_s": 10.0,
                "total_s": 45.0, "drain_s": 10.0,
            },
            "auth": {name: secrets.token_hex(16) for name in ("upstream_api_key", "control_key")}
            | {"api_keys": [secrets.token_hex(16)]},
        },
        "local": {
            "first_port": first + 1,
            "first_side_channel_port": first + 1 + count,
            "log_dir": str(folder / "logs"),
            "device": "cpu",
            # A soak ends instances more often than a fleet should bear.
            "restart": {"first_delay": "200ms", "max_delay": "500ms", "max_restarts": 1000},
            "start_timeout": "300s",
        },
    }  # fmt: skip


@contextlib.asynccontextmanager
async def running(folder: Path, file: dict[str, Any]) -> AsyncIterator[View]:
    """`vllm-suite up` on that file, until the block is left. Raises RuntimeError where it does not come up.

    On the way out `up` is asked to stop; RuntimeError where it does not end with status 0.
    """
    path, answer, log = folder / "fleet.yaml", folder / "up.json", folder / "up.log"
    await asyncio.to_thread(_prepare, path, answer, file)
    # The keeper ends `up` even where this process is killed.
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", keeper.__file__, str(os.getpid()), "60",
        sys.executable, "-m", "vllm_suite.cli.main", "up", str(path), "--json", str(answer),
        stdout=log.open("wb"), stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(START_S):
            while not answer.exists():
                if process.returncode is not None:
                    raise RuntimeError(f"the fleet did not start:\n{log.read_text(errors='replace')[-4000:]}")
                await asyncio.sleep(0.25)
        state = json.loads((folder / "logs" / "fleet.json").read_text())
        yield View(folder / "logs", FleetKeys.resolve(FleetSpec.model_validate(file).router.auth, {}), state["pid"])
    finally:
        if process.returncode is None:
            process.terminate()
        status = await asyncio.wait_for(process.wait(), 90)
    if status:
        raise RuntimeError(f"`up` ended with status {status}:\n{log.read_text(errors='replace')[-4000:]}")


def _prepare(path: Path, answer: Path, file: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    answer.unlink(missing_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    write_atomically(path, json.dumps(file, indent=1))
    path.chmod(0o600)


def tiny_model(folder: Path) -> Path:
    """The checkpoint that all engines of a soak serve."""
    return make_tiny_model(folder / "tiny")


async def answered(url: str, key: str | None, asked: Sequence[Question]) -> list[Question]:
    """The questions with what the engine at `url` answers, one by one. Raises RuntimeError where it does not."""
    found: list[Question] = []
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(url, headers=headers, timeout=timeout) as session:
        for question in asked:
            async with session.post(question.path, json=question.body) as answer:
                if answer.status != 200:
                    raise RuntimeError(f"{url} answers HTTP {answer.status}: {(await answer.text())[:300]}")
                tokens = (await answer.json())["choices"][0]["token_ids"]
                found.append(replace(question, expected=tuple(tokens)))
    return found


async def answers_of_one_engine(folder: Path, file: dict[str, Any], asked: Sequence[Question]) -> list[Question]:
    """What one plain `vllm serve` answers: no plugin of the suite, no connector, no router."""
    alone = {name: value for name, value in file.items() if name != "roles"}
    plain = FleetSpec.model_validate(alone | {"pools": {"any": {}}, "env": {"HF_HUB_OFFLINE": "1"}})
    local = plain.local.model_copy(update={"log_dir": folder / "single"})
    spec, launches = single_engine(plain.model_copy(update={"local": local}))
    async with Supervisor(launches, spec.local) as single:
        await single.start()
        return await answered(launches[0].url, FleetKeys.resolve(plain.router.auth, {}).upstream, asked)
