"""One process of the fleet: started under a keeper, asked whether it is ready, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vllm_suite.fleet import keeper
from vllm_suite.fleet.launch import Launch

if TYPE_CHECKING:
    import aiohttp

State = Literal["waiting", "starting", "ready", "draining", "restarting", "stopping", "stopped", "failed"]

_READY_PATH = {
    "state": "/suite/v1/state",
    "health": "/health",
    "router": "/suite/v1/instances",
    "metrics": "/metrics",
}
_POLL_S = 0.25
_REQUEST_S = 5.0
_UNREADY_STOP_S = 3.0
_KEEPER_MARGIN_S = 15.0  # the keeper's own steps after its stop time-out


class PortTaken(RuntimeError):
    """Something else listens on a port of the fleet."""


class Ended(RuntimeError):
    """The process ended before it was ready."""


class FleetProcess:
    """A `Launch` that runs, ran or will run.

    `restarts` counts starts after the first; `started_at` and `ready_at` are seconds of `time.monotonic`. `problem` is
    what ended it last, with its last lines: the log goes on with the next start.
    """

    def __init__(self, launch: Launch, stop_timeout_s: float) -> None:
        self.launch = launch
        self.stop_timeout_s = stop_timeout_s
        self.state: State = "waiting"
        self.restarts = 0
        self.problem: str | None = None
        self.exit_code: int | None = None
        self.started_at = 0.0
        self.ready_at: float | None = None
        self._process: asyncio.subprocess.Process | None = None

    @property
    def name(self) -> str:
        """The launch's name."""
        return self.launch.name

    async def start(self, *, fresh_log: bool) -> None:
        """Start the command. Raises PortTaken at once where a port is in use: vLLM would hang on some."""
        check_ports([self.launch])
        self.launch.log.parent.mkdir(parents=True, exist_ok=True)
        with self.launch.log.open("wb" if fresh_log else "ab") as log:
            # Readable, so that a failure can be repeated by hand; secrets are masked.
            log.write(f"$ {self.launch.shell()}\n".encode())
            log.flush()
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", keeper.__file__, str(os.getpid()), str(self.stop_timeout_s),
                *self.launch.argv,
                env=self.launch.environment(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.exit_code = None
        self.ready_at = None
        self.started_at = time.monotonic()

    async def wait_ready(self, session: aiohttp.ClientSession, timeout_s: float) -> None:
        """Until the process says it is ready. Raises Ended, or TimeoutError after `timeout_s` seconds."""
        ended = asyncio.ensure_future(self.wait())
        try:
            async with asyncio.timeout(timeout_s):
                while not await is_ready(session, self.launch):
                    done, _ = await asyncio.wait([ended], timeout=_POLL_S)
                    if done:
                        raise Ended(f"{self.name} ended with status {ended.result()} before it was ready")
        finally:
            ended.cancel()
        self.ready_at = time.monotonic()

    async def wait(self) -> int:
        """Until the process and all that it started have ended; returns the exit status."""
        assert self._process is not None
        code = await self._process.wait()
        # Only where the keeper itself was killed is anything left of its session.
        keeper.signal_all(session_members(self._process.pid), signal.SIGKILL)
        self.exit_code = code
        return code

    @property
    def running(self) -> bool:
        """Whether the command, or anything it started, is still there."""
        return self._process is not None and self._process.returncode is None

    def pids(self) -> list[int]:
        """Processes of the command, the command's own first; empty where it does not run."""
        return keeper.descendants(self._process.pid) if self.running and self._process else []

    def terminate(self) -> None:
        """Ask the command to end; asked twice, it is killed."""
        if self.running and self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)

    async def stop(self) -> None:
        """End the command and all that it started, within `stop_timeout_s` and a margin of seconds.

        A command that never became ready gets 3 s.
        """
        if not self.running or self._process is None:
            return
        self.terminate()
        ended = asyncio.ensure_future(self.wait())
        try:
            if self.ready_at is None:
                # It has no request to finish, and vLLM does not heed SIGTERM while its engine starts.
                await asyncio.wait([ended], timeout=_UNREADY_STOP_S)
                self.terminate()
            async with asyncio.timeout(self.stop_timeout_s + _KEEPER_MARGIN_S):
                await ended
        except TimeoutError:
            keeper.signal_all([*self.pids(), self._process.pid], signal.SIGKILL)
            await self.wait()

    def log_tail(self, lines: int = 25) -> str:
        """The last lines of the log."""
        return tail(self.launch.log, lines)


async def is_ready(session: aiohttp.ClientSession, launch: Launch) -> bool:
    """One question; False also where nobody answers. A router is ready when it has an instance to decode."""
    answer = await ask(session, launch)
    if launch.ready == "state":
        return answer is not None and answer.get("ready") is True
    if launch.ready == "router":
        return any(member["role"] in ("decode", "any") for member in ready_members(answer))
    return answer is not None


def ready_members(answer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The members that a router's answer says are ready."""
    return [member for member in (answer or {}).get("instances", []) if member.get("ready") is True]


async def ask(session: aiohttp.ClientSession, launch: Launch) -> dict[str, Any] | None:
    """What the process says of itself ({} for a plain vLLM and the controller); None where it gives no good answer."""
    import aiohttp

    headers = {"Authorization": f"Bearer {launch.control_key}"} if launch.control_key else {}
    timeout = aiohttp.ClientTimeout(total=_REQUEST_S)
    try:
        url = launch.url + _READY_PATH[launch.ready]
        async with session.get(url, headers=headers, timeout=timeout) as response:
            if response.status != 200:
                return None
            body = await response.json() if launch.ready not in ("health", "metrics") else {}
            return body if isinstance(body, dict) else None
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return None


def session_members(session: int) -> list[int]:
    """Processes of a session (see setsid)."""
    return [pid for pid, fields in keeper.processes() if int(fields[3]) == session and fields[0] != "Z"]


def check_ports(launches: Iterable[Launch]) -> None:
    """Raise PortTaken for the first port that cannot be bound."""
    for launch in launches:
        host = launch.url.split("://", 1)[1].rsplit(":", 1)[0].strip("[]")
        for port in launch.ports:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((host, port))
                except OSError as error:
                    raise PortTaken(f"port {port} of {launch.name} cannot be used: {error.strerror}") from error


def tail(path: Path, lines: int) -> str:
    """The last lines of a text file; empty where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 400 * lines))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
