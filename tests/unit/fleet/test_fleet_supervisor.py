"""The supervisor, with real processes: start, failure, restart with back-off, stop."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from servers import alive, local, server

from vllm_suite.fleet import supervisor as supervisor_module
from vllm_suite.fleet.demo_spec import free_ports
from vllm_suite.fleet.process import FleetProcess, PortTaken
from vllm_suite.fleet.state_file import STATE_FILE
from vllm_suite.fleet.supervisor import StartFailed, Supervisor
from vllm_suite.fleet.up import FolderInUse, only_fleet_in


class Log:
    """Collects changes of state."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, process: FleetProcess, why: str) -> None:
        self.lines.append(f"{process.name} {process.state}" + (f": {why}" if why else ""))

    async def until(self, text: str, count: int = 1, seconds: float = 10.0) -> None:
        async with asyncio.timeout(seconds):
            while sum(text in line for line in self.lines) < count:
                await asyncio.sleep(0.02)


def hellos(folder: Path, port: int) -> int:
    """How often the server of that port began."""
    return (folder / "one.log").read_text().splitlines().count(f"hello from {port}")


def answers(port: int, path: str = "/health") -> bool:
    with suppress(urllib.error.URLError, ConnectionError):
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2).status == 200)
    return False


async def test_start_and_stop_leave_nothing(tmp_path: Path) -> None:
    port = free_ports(2)
    log = Log()
    launches = [server(tmp_path, port, name="one"), server(tmp_path, port + 1, name="two")]
    async with Supervisor(launches, local(tmp_path), log) as supervisor:
        await supervisor.start()
        assert [process.state for process in supervisor.processes] == ["ready", "ready"]
        assert answers(port)
        assert answers(port + 1)
        pids = [pid for process in supervisor.processes for pid in process.pids()]
        assert len(pids) == 2
        state = json.loads((tmp_path / STATE_FILE).read_text())
        assert [row["state"] for row in state["processes"]] == ["ready", "ready"]
    assert not any(map(alive, pids))
    assert not answers(port)
    assert log.lines.count("one stopped") == 1
    assert hellos(tmp_path, port) == 1


async def test_a_first_start_that_fails_shows_the_log(tmp_path: Path) -> None:
    port = free_ports(2)
    launches = [server(tmp_path, port, "fail", "bad"), server(tmp_path, port + 1, name="good")]
    supervisor = Supervisor(launches, local(tmp_path))
    async with supervisor:
        with pytest.raises(StartFailed, match=r"(?s)bad: .* status 1 .*no such model: nowhere"):
            await supervisor.start()
    assert not any(process.running for process in supervisor.processes)


async def test_a_start_that_takes_too_long_fails(tmp_path: Path) -> None:
    launch = server(tmp_path, free_ports(1), "never")
    async with Supervisor([launch], local(tmp_path, start_timeout="500ms")) as supervisor:
        with pytest.raises(StartFailed, match=r"not ready after 0\.5 s"):
            await supervisor.start()
        assert not supervisor.processes[0].running


async def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    port = free_ports(1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        async with Supervisor([server(tmp_path, port)], local(tmp_path)) as supervisor:
            with pytest.raises(PortTaken, match=f"port {port} of one"):
                await supervisor.start()
            assert not (tmp_path / "one.log").exists()


async def test_a_crashed_instance_comes_back_on_its_port_while_the_other_serves(tmp_path: Path) -> None:
    port = free_ports(2)
    log = Log()
    launches = [server(tmp_path, port, name="one"), server(tmp_path, port + 1, name="two")]
    async with Supervisor(launches, local(tmp_path), log) as supervisor:
        await supervisor.start()
        one, two = supervisor.processes
        before, untouched = one.pids(), two.pids()
        os.kill(before[0], signal.SIGKILL)
        await log.until("one restarting")
        assert answers(port + 1)
        await log.until("one ready", count=2)
        assert answers(port)
        assert one.restarts == 1
        assert one.pids() != before
        assert two.pids() == untouched
        assert "one restarting: ended with status 137; restart 1 in 0.05 s" in log.lines
    assert hellos(tmp_path, port) == 2


async def test_restarts_back_off_and_end(tmp_path: Path) -> None:
    port = free_ports(1)
    log = Log()
    async with Supervisor([server(tmp_path, port)], local(tmp_path), log) as supervisor:
        await supervisor.start()
        for ready in range(1, 5):
            await log.until("one ready", count=ready)
            answers(port, "/exit?3")
        assert not supervisor.broken.is_set()
        await log.until("one failed: ended with status 3")
        await asyncio.wait_for(supervisor.broken.wait(), 1)
    delays = [line.rsplit(" in ", 1)[1] for line in log.lines if "restarting" in line]
    assert delays == ["0.05 s", "0.1 s", "0.2 s"]
    assert supervisor.processes[0].state == "failed"


async def test_starts_are_staggered(tmp_path: Path) -> None:
    port = free_ports(3)
    launches = [server(tmp_path, port + i, name=f"n{i}") for i in range(3)]
    async with Supervisor(launches, local(tmp_path, parallel_starts=1)) as supervisor:
        await supervisor.start()
        spans = sorted((p.started_at, p.ready_at or 0.0) for p in supervisor.processes)
    assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(spans))


async def test_a_fleet_with_an_instance_left_goes_on(tmp_path: Path) -> None:
    port = free_ports(2)
    log = Log()
    launches = [server(tmp_path, port, name="one"), server(tmp_path, port + 1, name="two")]
    settings = local(tmp_path, restart={"enabled": False})
    async with Supervisor(launches, settings, log) as supervisor:
        await supervisor.start()
        answers(port, "/exit?3")
        await log.until("one failed")
        assert not supervisor.broken.is_set()
        assert answers(port + 1)
        answers(port + 1, "/exit?0")
        await log.until("two failed: ended with status 0")
        await asyncio.wait_for(supervisor.broken.wait(), 1)


async def test_the_last_one_may_fail_while_another_is_started_anew(tmp_path: Path) -> None:
    """One that had failed and was asked for again; when that fails too, nothing is left to wait for."""
    port, log = free_ports(2), Log()
    launches = [server(tmp_path, port, name="one"), server(tmp_path, port + 1, name="two")]
    settings = local(tmp_path, restart={"enabled": False})
    async with Supervisor(launches, settings, log) as supervisor:
        await supervisor.start()
        one = supervisor.find("one")
        answers(port, "/exit?3")
        await log.until("one failed")
        one.launch = server(tmp_path, port, "never", "one")
        renewing = asyncio.create_task(supervisor.renew(one))
        await log.until("one starting", count=2)
        answers(port + 1, "/exit?3")
        await log.until("two failed")
        assert not supervisor.broken.is_set()
        async with asyncio.timeout(10):
            while not one.pids():
                await asyncio.sleep(0.02)
        os.kill(one.pids()[0], signal.SIGKILL)
        with pytest.raises(StartFailed, match="ended with status 137 before it was ready"):
            await renewing
        await asyncio.wait_for(supervisor.broken.wait(), 1)


@pytest.mark.parametrize("mode", ["never", "deaf"])
async def test_a_stop_during_the_start_is_quick_and_leaves_nothing(tmp_path: Path, mode: str) -> None:
    supervisor = Supervisor([server(tmp_path, free_ports(1), mode)], local(tmp_path, stop_timeout="60s"))
    async with supervisor:
        starting = asyncio.create_task(supervisor.start())
        while "hello" not in supervisor.processes[0].log_tail(1):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        pids = supervisor.processes[0].pids()
        starting.cancel()
        began = time.monotonic()
    assert time.monotonic() - began < 8
    assert not any(map(alive, pids))


async def test_a_killed_keeper_counts_as_a_crash_and_leaves_nothing(tmp_path: Path) -> None:
    log = Log()
    async with Supervisor([server(tmp_path, free_ports(1), "child")], local(tmp_path), log) as supervisor:
        await supervisor.start()
        pids = supervisor.processes[0].pids()
        assert len(pids) == 2
        os.kill(os.getsid(pids[0]), signal.SIGKILL)  # the keeper leads the session
        await log.until("one ready", count=2)
        assert not any(map(alive, pids))


async def test_a_port_taken_meanwhile_is_named_and_waited_for(tmp_path: Path) -> None:
    port = free_ports(1)
    log = Log()
    async with Supervisor([server(tmp_path, port)], local(tmp_path), log) as supervisor:
        await supervisor.start()
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            answers(port, "/exit?3")
            await log.until("one restarting: ended with status 3")
            taken.bind(("127.0.0.1", port))
            taken.listen()
            await log.until(f"one restarting: port {port} of one cannot be used: Address already in use")
        await log.until("one ready", count=2)


def test_one_fleet_per_folder(tmp_path: Path) -> None:
    with only_fleet_in(tmp_path), pytest.raises(FolderInUse, match="another fleet runs in"), only_fleet_in(tmp_path):
        pass
    with only_fleet_in(tmp_path):
        pass


@pytest.mark.parametrize("method", ["wait_ready", "wait"])
async def test_a_defect_in_the_watching_is_no_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """At the start it fails the start; later the process counts as failed, and the fleet as broken where it matters."""
    port, log, real = free_ports(1), Log(), getattr(FleetProcess, method)
    now = ["broken" if method == "wait_ready" else "fine"]

    async def defect(self: FleetProcess, *args: object) -> object:
        while now == ["fine"]:
            await asyncio.sleep(0.02)
        if now == ["mended"]:
            return await real(self, *args)
        raise KeyError("nobody foresaw this")

    monkeypatch.setattr(FleetProcess, method, defect)
    async with Supervisor([server(tmp_path, port, name="one")], local(tmp_path), log) as supervisor:
        async with asyncio.timeout(20):
            if now == ["broken"]:
                with pytest.raises(StartFailed, match="one: it is not watched any more: KeyError"):
                    await supervisor.start()
            else:
                await supervisor.start()
                now[0] = "broken"
                await supervisor.broken.wait()
        assert supervisor.processes[0].state == "failed"
        now[0] = "mended"
    assert not answers(port)


async def test_a_state_file_that_cannot_be_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(supervisor_module, "write_state", full)
    port, log = free_ports(1), Log()
    async with Supervisor([server(tmp_path, port, name="one")], local(tmp_path), log) as supervisor:
        await supervisor.start()
        assert answers(port)
    assert any("its state cannot be written: [Errno 28]" in line for line in log.lines)
