"""`vllm-suite restart` over a real router, supervisor and socket, with programs in place of engines."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from servers import engine, local

from vllm_suite.cli.main import main
from vllm_suite.fleet import restart, supervisor
from vllm_suite.fleet.control import SOCKET_FILE, Control
from vllm_suite.fleet.demo_spec import free_ports
from vllm_suite.fleet.files import parse_fleet
from vllm_suite.fleet.launch_front import WITHDRAWN_FILE, plan_router, router_config
from vllm_suite.fleet.process import FleetProcess
from vllm_suite.fleet.restart import alone
from vllm_suite.fleet.state_file import write_atomically
from vllm_suite.fleet.supervisor import Supervisor
from vllm_suite.fleet.up import orders

POOLS: dict[str, Any] = {"prefill": {"replicas": 1}, "decode": {"replicas": 2}}


class Running:
    """The fleet, what was said of it, and a client."""

    def __init__(self, supervisor: Supervisor, folder: Path, client: aiohttp.ClientSession, lines: list[str]) -> None:
        self.supervisor, self.folder, self.client, self.lines = supervisor, folder, client, lines

    async def order(self, *words: str) -> int:
        """The exit status of `vllm-suite restart`."""
        argv = ["restart", "--log-dir", str(self.folder), "--json", str(self.folder / "out.json"), *words]
        return await asyncio.to_thread(main, argv)

    def out(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "out.json").read_text())
        return found

    async def ask(self, tenths: int = 1, prompt: int = 3) -> tuple[int, str]:
        """A request that takes so long on decode; short prompts see no prefill."""
        url = self.supervisor.find("fleet-router").launch.url
        body = {"model": "tiny", "prompt": list(range(prompt)), "max_tokens": tenths}
        async with self.client.post(url + "/v1/completions", json=body) as answer:
            return answer.status, await answer.text()

    def pids(self) -> dict[str, list[int]]:
        return {one.name: one.pids() for one in self.supervisor.processes}

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not true():
                await asyncio.sleep(0.02)


Start = Callable[..., Awaitable[Running]]


@asynccontextmanager
async def fleet(folder: Path, pools: dict[str, Any]) -> AsyncIterator[Running]:
    first = free_ports(8)
    spec = parse_fleet(
        json.dumps(
            {
                "model": "m",
                "pools": pools,
                "router": {
                    "port": first,
                    "membership": {"poll_interval_s": 0.1},
                    "limits": {"wait_for_instance_s": 0.5},
                },
                "local": {"first_port": first + 1, "log_dir": str(folder), "device": "cpu"},
            }
        )
    )
    launches = [engine(folder, one.api, one.name, one.role) for one in spec.instances()]
    write_atomically(folder / "router.yaml", router_config(spec, launches))
    lines: list[str] = []

    def changed(process: FleetProcess, why: str) -> None:
        lines.append(f"{process.name} {process.state} {why}".strip())

    settings = local(folder, stop_timeout="5s", start_timeout="30s")
    launches.append(plan_router(spec, launches))
    async with Supervisor(launches, settings, changed) as supervisor, aiohttp.ClientSession() as client:
        await supervisor.start()
        async with orders(supervisor, lines.append):
            yield Running(supervisor, folder, client, lines)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart, "LOOK_S", 0.1)
    monkeypatch.setattr(restart, "_OTHERS_S", 0.3)
    for name in ("VLLM_API_KEY", "VLLM_SUITE_API_KEY", "VLLM_SUITE_CONTROL_KEY", "VLLM_SUITE_UPSTREAM_API_KEY"):
        monkeypatch.delenv(name, raising=False)


async def test_all_in_turn_while_requests_run(tmp_path: Path) -> None:
    """Each gets a new process, no two are away at once, and no request fails."""
    async with fleet(tmp_path, {"decode": {"replicas": 3}}) as running:
        before = running.pids()
        statuses: list[int] = []
        ending = asyncio.Event()

        async def load() -> None:
            while not ending.is_set():
                statuses.append((await running.ask())[0])

        clients = [asyncio.create_task(load()) for _ in range(6)]
        mark = len(running.lines)
        assert await running.order("--all") == 0
        ending.set()
        await asyncio.gather(*clients)
        assert set(statuses) == {200}
        assert len(statuses) > 20
        after = running.pids()
        assert after.pop("fleet-router") == before.pop("fleet-router")
        assert not {pid for pids in after.values() for pid in pids} & {pid for pids in before.values() for pid in pids}
        assert [line.split()[1] for line in running.lines[mark:]] == [
            "draining", "stopping", "restarting", "starting", "ready",
        ] * 3  # fmt: skip
        assert [row["name"] for row in running.out()["restarted"]] == sorted(after)
        assert all(row["cut_requests"] == 0 for row in running.out()["restarted"])
        assert not (tmp_path / WITHDRAWN_FILE).exists()
        # As often as one likes: restarts that were asked for use up none of those after faults.
        for _ in range(running.supervisor.local.restart.max_restarts + 1):
            assert await running.order("fleet-decode-0") == 0
        assert running.supervisor.find("fleet-decode-0").state == "ready"
    assert not (tmp_path / SOCKET_FILE).exists()


async def test_work_and_blocks_are_finished_first(tmp_path: Path) -> None:
    async with fleet(tmp_path, POOLS) as running:
        asked = [asyncio.create_task(running.ask(20)) for _ in range(4)]  # two on each
        await asyncio.sleep(0.5)
        assert await running.order("fleet-decode-0") == 0
        assert [(await one)[0] for one in asked] == [200] * 4
        # Blocks and encoder outputs that nobody has fetched yet keep their instance, where nothing else does.
        for kind in ("kv", "ec"):
            left, mark = tmp_path / f"fleet-decode-1.{kind}", len(running.lines)
            left.write_text("2")
            told = asyncio.create_task(running.order("fleet-decode-1"))
            await running.until(lambda since=mark: "fleet-decode-1 draining" in running.lines[since:])
            await asyncio.sleep(1.0)
            assert "fleet-decode-1 stopping as asked" not in running.lines[mark:]
            left.write_text("0")
            assert await told == 0


async def test_what_nobody_else_does_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with fleet(tmp_path, POOLS) as running:
        before, mark = running.pids(), len(running.lines)
        assert await running.order("--all") == 1
        assert "fleet-prefill-0: no other instance that is ready does prefill" in capsys.readouterr().err
        assert (running.pids(), running.lines[mark:]) == (before, [])
        assert await running.order("fleet-prefill-0", "--force") == 0
        assert running.pids()["fleet-prefill-0"] != before["fleet-prefill-0"]


async def test_a_role_that_was_set_by_hand_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with fleet(tmp_path, {"any": {"replicas": 2}}) as running:
        router = running.supervisor.find("fleet-router").launch.url

        async def roles() -> dict[str, str]:
            async with running.client.get(router + "/suite/v1/instances") as answer:
                return {row["instance_id"]: row["role"] for row in (await answer.json())["instances"]}

        url = running.supervisor.find("fleet-any-0").launch.url
        async with running.client.get(url + "/suite/v1/state") as answer:
            state = await answer.json()
        body = {"role": "prefill", "epoch": state["epoch"], "role_epoch": 0}
        async with running.client.post(url + "/suite/v1/role", json=body) as answer:
            assert answer.status == 202
        before = running.pids()
        assert await running.order("fleet-any-0") == 0
        assert "fleet-any-0: prefill again" in capsys.readouterr().out
        assert running.pids()["fleet-any-0"] != before["fleet-any-0"]
        assert await roles() == {"fleet-any-0": "prefill", "fleet-any-1": "any"}
        assert [row["role"] for row in running.out()["restarted"]] == ["prefill"]
        # Before requests come: nothing of theirs has to be drained.
        assert (tmp_path / "fleet-any-0.listed").read_text() == "False"
        # Where that fails it serves all the same, in the role in which it started, and that is said.
        (tmp_path / "fleet-any-0.back").touch()
        assert await running.order("fleet-any-0") == 0
        said = capsys.readouterr().out
        assert "fleet-any-0: is not prefill again: the probe failed; it is any and serving" in said
        assert await roles() == {"fleet-any-0": "any", "fleet-any-1": "any"}
        assert [row["role"] for row in running.out()["restarted"]] == ["any"]


async def test_work_that_does_not_end_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with fleet(tmp_path, {"decode": {"replicas": 2}}) as running:
        before = running.pids()
        asked = [asyncio.create_task(running.ask(40)) for _ in range(2)]
        await asyncio.sleep(0.5)
        assert await running.order("fleet-decode-0", "--finish", "0.3") == 1
        said = capsys.readouterr().err
        assert "after 0.3 s 1 requests and 0 leases left; it was not ended and serves again" in said
        assert running.pids() == before
        assert running.supervisor.find("fleet-decode-0").state == "ready"
        assert not (tmp_path / WITHDRAWN_FILE).exists()
        assert await running.order("fleet-decode-0", "--finish", "0.3", "--force") == 0
        assert running.out()["restarted"][0]["cut_requests"] == 1
        # An unstreamed answer that was cut off is computed elsewhere.
        assert [(await one)[0] for one in asked] == [200, 200]


async def test_one_that_does_not_come_back_ends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # It has begun another life by then, whose command is the end of the log.
    monkeypatch.setattr(supervisor, "_LOOK_S", 0.6)
    async with fleet(tmp_path, {"decode": {"replicas": 2}}) as running:
        before = running.pids()
        (tmp_path / "fleet-decode-0.fail").touch()
        assert await running.order("--all") == 1
        said = capsys.readouterr().err
        assert "fleet-decode-0 did not become ready again" in said
        assert "fleet-decode-0 ended with status 1 before it was ready" in said
        assert "no such model: nowhere" in said
        assert running.out()["restarted"] == []
        assert running.pids()["fleet-decode-1"] == before["fleet-decode-1"]
        # The other one does its work, and is not taken away.
        assert await running.order("fleet-decode-1") == 1
        await running.until(lambda: running.supervisor.find("fleet-decode-0").state == "failed")
        (tmp_path / "fleet-decode-0.fail").unlink()
        assert await running.order("fleet-decode-0") == 0
        assert {(await running.ask())[0] for _ in range(4)} == {200}


async def test_who_asked_may_change_his_mind(tmp_path: Path) -> None:
    async with fleet(tmp_path, {"decode": {"replicas": 2}}) as running:
        before = running.pids()
        asked = [asyncio.create_task(running.ask(25)) for _ in range(2)]
        await asyncio.sleep(0.5)
        command = [sys.executable, "-m", "vllm_suite.cli.main", "restart", "--all", "--log-dir", str(tmp_path)]
        process = await asyncio.create_subprocess_exec(*command)
        await running.until(lambda: "fleet-decode-0 draining" in running.lines)
        # A second order waits for nothing.
        assert await running.order("--all") == 1
        assert running.out()["problem"] == "another order is under way"
        process.kill()
        await process.wait()
        await running.until(lambda: "fleet-decode-0 ready again" in running.lines)
        assert [(await one)[0] for one in asked] == [200, 200]
        assert running.pids() == before


async def test_a_full_disk_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    async with fleet(tmp_path, {"decode": {"replicas": 2}}) as running:
        before = running.pids()
        with monkeypatch.context() as patched:
            patched.setattr(restart, "write_atomically", full)
            assert await running.order("--all") == 1
        assert "No space left" in capsys.readouterr().err
        assert running.supervisor.find("fleet-decode-0").state == "ready"
        assert running.pids() == before
        assert await running.order("fleet-decode-0") == 0


async def test_orders_that_make_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with fleet(tmp_path, {"decode": {"replicas": 1}}) as running:
        assert await running.order("fleet-decode-1") == 2
        assert "fleet-decode-1; its instances are fleet-decode-0" in capsys.readouterr().err
        assert await running.order("fleet-router", "--force") == 2
        assert await running.order("--all", "--finish", "1e9") == 2
        assert "finish_s" in capsys.readouterr().err
        assert await running.order() == 2
        assert await running.order("fleet-decode-0", "--all") == 2
        assert stat.S_IMODE((tmp_path / SOCKET_FILE).stat().st_mode) == 0o600
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / SOCKET_FILE))
        writer.write(b"[" * 100_000 + b"\n")
        assert json.loads(await reader.readline())["end"]["status"] == 2
        writer.close()
    assert await running.order("--all") == 1
    assert "no running fleet in" in capsys.readouterr().err
    assert await asyncio.to_thread(main, ["restart", "--all", "--log-dir", str(tmp_path / "none")]) == 1


async def test_a_folder_that_takes_no_socket_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / SOCKET_FILE).mkdir()
    lines: list[str] = []
    files = len(os.listdir("/proc/self/fd"))
    async with orders(Supervisor([], local(tmp_path)), lines.append):
        assert "`vllm-suite restart` does not reach this fleet: Is a directory" in lines[0]
        assert len(os.listdir("/proc/self/fd")) == files
        assert await asyncio.to_thread(main, ["restart", "--all", "--log-dir", str(tmp_path)]) == 1
    assert "no running fleet in" in capsys.readouterr().err


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
async def test_nobody_else_gives_orders(tmp_path: Path) -> None:
    async def never(*_: Any) -> dict[str, Any]:
        raise AssertionError("the order was carried out")

    def somebody(folder: int, out: int) -> None:
        """In a process of its own: gives an order as user nobody and passes the answer on."""
        os.fchdir(folder)
        os.setuid(65534)
        with socket.socket(socket.AF_UNIX) as one:
            one.connect(SOCKET_FILE)
            one.sendall(b'{"order": {}}\n')
            os.write(out, one.recv(1000))

    os.chmod(tmp_path, 0o755)
    folder = os.open(tmp_path, os.O_RDONLY)  # the folders above it are closed to others
    async with Control(tmp_path, never):
        (tmp_path / SOCKET_FILE).chmod(0o666)  # as if its mode did not keep others out
        said, out = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                somebody(folder, out)
            except OSError as error:
                os.write(out, repr(error).encode())
            finally:
                os._exit(0)
        os.close(out)
        answer = await asyncio.to_thread(os.read, said, 1000)
        await asyncio.to_thread(os.waitpid, child, 0)
    for descriptor in (folder, said):
        os.close(descriptor)
    assert b"only the user who runs the fleet" in answer, answer


@pytest.mark.parametrize(
    ("role", "others", "stage"),
    [
        ("decode", ["decode"], None), ("decode", ["any"], None), ("decode", ["prefill", "encode"], "decode"),
        ("any", ["decode"], None), ("any", ["prefill"], "decode"), ("prefill", ["decode"], "prefill"),
        ("prefill", ["any"], None), ("encode", ["prefill", "decode"], "encode"), ("decode", ["-decode"], "decode"),
    ],
)  # fmt: skip
def test_whose_work_nobody_would_do(role: str, others: list[str], stage: str | None) -> None:
    rows = {"me": {"role": role, "ready": True}}
    rows |= {f"{i}": {"role": one.strip("-"), "ready": not one.startswith("-")} for i, one in enumerate(others)}
    assert alone(rows, "me") == stage
    assert alone(rows, "unknown") is None
