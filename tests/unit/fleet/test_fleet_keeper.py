"""The keeper, with real processes: status passed on, nothing left behind however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from servers import alive, eventually

from vllm_suite.fleet import keeper
from vllm_suite.fleet.process import session_members

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a Python program under a keeper."""
    started: list[subprocess.Popen[str]] = []

    def begin(code: str, *args: str, stop_timeout_s: float = 1.0) -> subprocess.Popen[str]:
        command = [sys.executable, "-I", "-S", keeper.__file__, str(os.getpid()), str(stop_timeout_s)]
        command += [sys.executable, "-u", "-c", textwrap.dedent(code), *args]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        below = keeper.descendants(process.pid)
        with suppress(ProcessLookupError):
            process.kill()
        keeper.signal_all(below, signal.SIGKILL)
        process.wait(10)


def lines(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().strip() for _ in range(count)]


@pytest.mark.parametrize(
    ("code", "status"),
    [("raise SystemExit(0)", 0), ("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 128 + 9)],
)
def test_the_status_is_passed_on(start: Start, code: str, status: int) -> None:
    assert start(code).wait(10) == status


def test_a_command_that_is_missing_is_named() -> None:
    command = [sys.executable, "-I", "-S", keeper.__file__, str(os.getpid()), "1", "/nowhere/vllm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == 127
    assert "cannot start /nowhere/vllm: No such file" in done.stderr


def test_sigterm_reaches_the_command(start: Start) -> None:
    process = start(
        """
        import signal, sys
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        print("up")
        signal.pause()
        """
    )
    lines(process, 1)
    process.terminate()
    assert process.wait(10) == 5


STUBBORN = """
    import os, signal, subprocess, sys
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A grandchild in a session of its own, which also ignores SIGTERM.
    code = "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    child.stdout.readline()
    print(os.getpid())
    print(child.pid)
    signal.pause()
"""


def test_what_ignores_sigterm_is_killed_with_all_it_started(start: Start) -> None:
    process = start(STUBBORN, stop_timeout_s=0.5)
    pids = [int(line) for line in lines(process, 2)]
    began = time.monotonic()
    process.terminate()
    assert process.wait(10) == 128 + 9
    assert 0.4 < time.monotonic() - began < 8
    assert not any(map(alive, pids))


def test_a_second_sigterm_does_not_wait(start: Start) -> None:
    process = start(STUBBORN, stop_timeout_s=600)
    pids = [int(line) for line in lines(process, 2)]
    process.terminate()
    time.sleep(0.7)
    process.terminate()
    assert process.wait(15) == 128 + 9
    assert not any(map(alive, pids))


def test_signals_at_once_are_one_request(start: Start) -> None:
    process = start(
        """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), sys.exit(5)))
        print("up")
        signal.pause()
        """,
        stop_timeout_s=5,
    )
    lines(process, 1)
    for _ in range(3):
        process.terminate()
        time.sleep(0.02)
    assert process.wait(10) == 5


def test_a_stopped_command_is_ended_too(start: Start) -> None:
    process = start("import os, signal; print(os.getpid()); signal.pause()", stop_timeout_s=5)
    (pid,) = (int(line) for line in lines(process, 1))
    os.kill(pid, signal.SIGSTOP)
    process.terminate()
    assert process.wait(4) == 128 + 15
    assert not alive(pid)


def test_orphans_end_with_the_command(start: Start) -> None:
    process = start(
        """
        import os, subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        print(child.pid, flush=True)
        os._exit(3)
        """
    )
    (pid,) = (int(line) for line in lines(process, 1))
    assert process.wait(10) == 3
    assert not alive(pid)


def test_the_command_ends_when_the_parent_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, subprocess, sys, time
command = [sys.executable, "-I", "-S", {keeper.__file__!r}, str(os.getpid()), "1"]
child = "import os, time; open('{tmp_path}/pid', 'w').write(str(os.getpid())); time.sleep(600)"
subprocess.Popen([*command, sys.executable, "-c", child], start_new_session=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert eventually(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()))
        pid = int((tmp_path / "pid").read_text())
        assert alive(pid)
    finally:
        parent.kill()
        parent.wait(10)
    assert eventually(lambda: not alive(pid))


def test_the_command_ends_when_the_keeper_is_killed(start: Start) -> None:
    process = start("import os, signal; print(os.getpid()); signal.pause()")
    (pid,) = (int(line) for line in lines(process, 1))
    process.kill()
    process.wait(10)
    assert eventually(lambda: not alive(pid))


SHARED = """
    import mmap, os, signal, sys
    for name in sys.argv[1:]:
        handle = os.open("/dev/shm/" + name, os.O_CREAT | os.O_RDWR, 0o600)
        os.ftruncate(handle, 4096)
        globals()[name] = mmap.mmap(handle, 4096)
    print("up", flush=True)
    signal.pause()
"""


def test_shared_memory_is_removed_unless_another_process_uses_it(start: Start) -> None:
    ours, both, foreign = (Path(f"/dev/shm/psm_suite_test_{os.getpid()}_{i}") for i in range(3))
    foreign.write_bytes(b"x")
    try:
        process = start(SHARED, ours.name, both.name)
        lines(process, 1)
        other = start(SHARED, both.name)
        lines(other, 1)
        # The keeper looks once a second; on SIGTERM it looks once more.
        process.terminate()
        output, _ = process.communicate(timeout=10)
        assert not ours.exists()
        assert both.exists()
        assert foreign.exists()
        assert f"removed shared memory left behind: {ours}\n" in output
        other.terminate()
        other.wait(10)
        assert not both.exists()
    finally:
        for path in (ours, both, foreign):
            path.unlink(missing_ok=True)


def test_shared_memory_is_seen_within_a_second_however_old_the_command_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine takes minutes to start vLLM, and it may be killed right after."""
    clock = [0.0]
    monkeypatch.setattr(keeper, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    looking = keeper.Keeper([], 1.0)
    for clock[0] in (1.0, 3600.0, 3601.0, 3602.0):
        looking._tick()
    name = f"psm_suite_test_{os.getpid()}_late"
    command = [sys.executable, "-u", "-c", textwrap.dedent(SHARED), name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            lines(process, 1)
            clock[0] = 3603.0
            looking._tick()
            assert f"/dev/shm/{name}" in looking.shm
        finally:
            process.kill()
            Path("/dev/shm", name).unlink(missing_ok=True)


def test_shared_memory_of_a_killed_command_is_removed(start: Start) -> None:
    name = f"psm_suite_test_{os.getpid()}_killed"
    process = start(SHARED, name)
    lines(process, 1)
    time.sleep(1.5)  # the keeper looks once a second
    keeper.signal_all(keeper.descendants(process.pid), signal.SIGKILL)
    assert process.wait(10) == 128 + 9
    assert not Path("/dev/shm", name).exists()


def test_a_process_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are cut at 15 bytes, amid a letter where it comes so: somebody's process must not end the keepers.

    From a folder: a real one would end keepers of other versions that run beside.
    """
    for pid, name, parent in ((1, b"init", 0), (7, b"caf\xe9", 1), (8, b") x (", 7)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_bytes(b"%d (%b) S %d 5 5 0 -1\n" % (pid, name, parent))
    (tmp_path / "9").mkdir()
    monkeypatch.setattr(keeper, "_PROC", str(tmp_path))
    assert keeper.descendants(1) == [7, 8]
    assert sorted(session_members(5)) == [1, 7, 8]
