"""A real ``vllm serve`` in a process of its own, and the ways a test talks to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from child import ENGINE_ENV
from prometheus_client.parser import text_string_to_metric_families

START_TIMEOUT_S = 180.0
_OWN = "the server's own"


@dataclass
class Server:
    """``key`` goes with every request that names no other; None sends none."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    key: str | None = None

    def request(self, path: str, key: str | None = _OWN, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        key = self.key if key is _OWN else key
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            if body is None:
                connection.request("GET", path, headers=headers)
            else:
                headers["Content-Type"] = "application/json"
                connection.request("POST", path, json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        return answer.status, json.loads(text) if text.startswith(("{", "[", '"')) else text

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        return self.request(path, body=body)

    def state(self) -> dict[str, Any]:
        status, state = self.request("/suite/v1/state")
        assert status == 200, state
        document: dict[str, Any] = state
        return document

    def series(self, prefix: str) -> dict[str, float]:
        """Samples by name whose names begin so, labels summed over."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.request("/metrics")[1]):
            for sample in family.samples:
                if sample.name.startswith(prefix) and not sample.name.endswith("_created"):
                    found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            with contextlib.suppress(OSError):
                if self.request("/health")[0] == 200:
                    return
            time.sleep(0.3)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)


@contextlib.contextmanager
def start(
    words: Sequence[str], port: int, log: Path, env: dict[str, str] | None = None, key: str | None = None
) -> Iterator[Server]:
    """``vllm serve WORDS``, ended afterwards; `Server.wait_ready` waits for it. No ``VLLM_*`` variable is inherited."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    clean |= {k: v for k, v in ENGINE_ENV.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    clean |= {"VLLM_LOGGING_LEVEL": "INFO", **(env or {})}
    vllm = Path(sys.executable).with_name("vllm")
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(vllm), "serve", *words], env=clean, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Server(process, port, log, key)
    try:
        yield server
    finally:
        server.stop()


def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    """What ``condition`` returns once it is true."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found
