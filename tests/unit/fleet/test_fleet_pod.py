"""What Kubernetes runs inside a pod: readiness, drain, and the chart's test, against servers that answer as told."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, get_args

import pytest
from prometheus_client import generate_latest

from vllm_suite.fleet.pod import checking, leaving
from vllm_suite.fleet.pod.asking import CLIENT_KEYS, CONTROL_KEYS, CheckFailed
from vllm_suite.fleet.pod.command import main
from vllm_suite.fleet.pod.leaving import drain
from vllm_suite.metrics import EC, KV, ROUTER
from vllm_suite.roles.state import Phase
from vllm_suite.router.members import Pool
from vllm_suite.router.metrics import Live, RouterMetrics

STATE: dict[str, Any] = {
    "ready": True,
    "draining": False,
    "role": "decode",
    "kv_connector": "SuiteNixlConnector",
    "load": {"running": 0, "waiting": 0},
}


class Server(ThreadingHTTPServer):
    """An instance and a router in one: `state`, `text` of /metrics, and what a completion does."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.state = dict(STATE)
        self.metrics = RouterMetrics(Pool(), Live(256, 4.0))
        self.pulls = 0
        self.leases: dict[str, int] = {}
        self.key: str | None = None
        self.sick = False  # no metrics
        self.broken = 0  # so many of the next questions about the state are not answered
        self.path_taken = ("disaggregated", "long")
        self.pulls_per_request = 1
        self.prompts: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _say(self, status: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        at = self.server
        if at.key and self.path != "/metrics" and self.headers["Authorization"] != f"Bearer {at.key}":
            self._say(401, {})
        elif self.path == "/suite/v1/state" and at.broken:
            at.broken -= 1
            self.close_connection = True
        elif self.path == "/suite/v1/state":
            self._say(200, at.state)
        elif self.path == "/metrics" and at.sick:
            self._say(500, "a defect")
        elif self.path == "/metrics":
            pulls = f'vllm_suite_kv_pulls_total{{outcome="ok",engine="0"}} {at.pulls}.0\n'
            failed = 'vllm_suite_kv_pulls_total{outcome="failed",engine="0"} 7.0\n'
            leases = "".join(f"# HELP {name} x\n{name} {count}.0\n" for name, count in at.leases.items())
            self._say(200, generate_latest(at.metrics.registry) + (pulls + failed + leases).encode())
        elif self.path == "/v1/models":
            self._say(200, {"data": [{"id": "m"}]})
        elif self.path == "/ready":
            self._say(200, {"status": "ready"})
        else:
            self._say(404, {})

    def do_POST(self) -> None:
        at = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        at.prompts.append(body["prompt"])
        at.metrics.count("decisions", *at.path_taken)
        at.pulls += at.pulls_per_request
        self._say(200, {"usage": {"prompt_tokens": 300, "completion_tokens": body["max_tokens"]}})


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    thread = threading.Thread(target=one.serve_forever, args=(0.01,))
    thread.start()
    yield one
    one.shutdown()
    thread.join()
    one.server_close()


def run(*argv: str) -> int:
    return main(["--timeout", "2", *argv])


def test_ready_means_role_and_connector_too(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("ready", "--url", server.url, "--role", "decode", "--connector", "SuiteNixlConnector")
    assert run(*asked) == 0
    wrong: list[tuple[str, object, str]] = [
        ("ready", False, "not ready"),
        ("draining", True, "not ready"),
        ("role", "prefill", "its role is 'prefill'"),
        ("kv_connector", None, "its KV connector is None"),
    ]
    for name, value, says in wrong:
        server.state = {**STATE, name: value}
        assert run(*asked) == 1
        assert says in capsys.readouterr().err


def test_an_instance_that_changes_its_role_stays_ready(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("ready", "--url", server.url, "--role", "any", "--connector", "SuiteNixlConnector")
    for role in ("any", "prefill", "decode"):
        server.state = {**STATE, "role": role, "phase": "serving"}
        assert run(*asked) == 0
    for phase in get_args(Phase):
        server.state = {**STATE, "ready": phase == "serving", "phase": phase}
        assert (run(*asked) == 0) is (phase != "out"), phase


def test_the_control_key_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "k"
    for name in (*CONTROL_KEYS, *CLIENT_KEYS):
        monkeypatch.delenv(name, raising=False)
    assert run("ready", "--url", server.url) == 1
    monkeypatch.setenv("VLLM_SUITE_CONTROL_KEY", "k")
    assert run("ready", "--url", server.url) == 0
    assert run("router-ready", "--url", server.url) == 1
    monkeypatch.setenv("VLLM_SUITE_API_KEY", "k")
    assert run("router-ready", "--url", server.url) == 0


def test_nobody_there_is_not_ready(server: Server) -> None:
    assert run("ready", "--url", "http://127.0.0.1:1") == 1


class Clock:
    """Time that passes in `sleep` alone, and a story that goes with it."""

    def __init__(self, server: Server, story: dict[int, tuple[int, int]], kind: str = "kv") -> None:
        self.now, self._server, self._story, self._kind = 0.0, server, story, kind
        self._tell()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._tell()

    def _tell(self) -> None:
        for at, (running, leases) in self._story.items():
            if self.now >= at:
                self._server.state = {**STATE, "load": {"running": running, "waiting": 0}}
                self._server.leases = {f"vllm_suite_{self._kind}_leases_outstanding": leases}


@pytest.mark.parametrize("kind", ["kv", "ec"])
def test_drain_waits_for_requests_and_then_for_what_others_fetch(server: Server, kind: str) -> None:
    clock = Clock(server, {0: (2, 0), 40: (0, 1), 47: (0, 0)}, kind)
    assert drain(server.url, 10.0, 300.0, clock.sleep, clock) == "drained"
    assert 47 <= clock.now <= 51


def test_a_request_between_two_looks_is_waited_for(server: Server) -> None:
    clock = Clock(server, {0: (0, 0), 11: (1, 0), 30: (0, 0)})
    drain(server.url, 10.0, 300.0, clock.sleep, clock)
    assert clock.now >= 30


@pytest.mark.parametrize(("kind", "seconds"), [("kv", 20), ("ec", 40)])
def test_an_old_gauge_of_leases_does_not_hold_a_pod_for_ever(server: Server, kind: str, seconds: int) -> None:
    clock = Clock(server, {0: (0, 3)}, kind)
    drain(server.url, 10.0, 300.0, clock.sleep, clock)
    assert 10 + seconds <= clock.now <= 13 + seconds


def test_drain_ends_at_its_deadline_or_with_the_instance(server: Server) -> None:
    clock = Clock(server, {0: (1, 0)})
    with pytest.raises(CheckFailed, match="after 60 s still 1 requests"):
        drain(server.url, 10.0, 60.0, clock.sleep, clock)
    assert 70 <= clock.now <= 72
    with pytest.raises(CheckFailed, match="nothing to wait for"):
        drain("http://127.0.0.1:1", 0.0, 60.0, clock.sleep, clock)


def test_a_late_answer_does_not_cost_the_requests_that_run(server: Server) -> None:
    clock = Clock(server, {0: (1, 0), 40: (0, 0)})
    server.broken = 5
    assert drain(server.url, 10.0, 300.0, clock.sleep, clock) == "drained"
    assert clock.now >= 40
    server.broken = 99
    with pytest.raises(CheckFailed, match="nothing to wait for"):
        drain(server.url, 0.0, 300.0, clock.sleep, clock)


def test_drain_counts_at_the_door_where_the_engine_does_not_tell(server: Server) -> None:
    server.state = {**STATE, "load": {}, "running": {"decode": 1, "unknown": 0}}
    with pytest.raises(CheckFailed, match="still 1 requests"):
        drain(server.url, 0.0, 0.0, lambda seconds: None)


def test_check_proves_that_a_request_was_disaggregated(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.pulls = 5
    asked = ("check", "--router", server.url, "--decode", server.url, "--prompt-tokens", "300")
    assert run(*asked) == 0
    assert capsys.readouterr().out == "disaggregated: 300 prompt tokens prefilled, 1 pulls, 0 recoveries\n"
    assert run(*asked) == 0
    first, second = server.prompts
    assert first != second, "decode has the first one cached"
    assert len(first.split()) == 300


def test_check_says_what_the_router_answered(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.sick = True
    assert run("check", "--router", server.url) == 1
    assert capsys.readouterr().err == 'check: /metrics answered 500: "a defect"\n'


def test_check_fails_where_decode_did_all(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("check", "--router", server.url, "--decode", server.url)
    server.path_taken = ("direct", "no_prefill")
    assert run(*asked) == 1
    assert "straight to decode" in capsys.readouterr().err
    server.path_taken, server.pulls_per_request = ("disaggregated", "long"), 0
    assert main(["--timeout", "0.3", *asked]) == 1
    assert "pulled no KV blocks" in capsys.readouterr().err


def test_check_without_prefill_wants_an_answer(server: Server) -> None:
    server.path_taken = ("direct", "no_prefill")
    assert run("check", "--router", server.url) == 0


def test_a_worker_outlives_its_leader(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LWS_LEADER_ADDRESS", "127.0.0.1")
    monkeypatch.setattr(leaving.time, "sleep", lambda seconds: None)
    assert run("outlive", "--port", str(server.server_port), "--limit", "0.05") == 1
    assert run("outlive", "--port", "1", "--limit", "5") == 0
    answers = iter([TimeoutError("late")] * 3 + [ConnectionRefusedError("gone")])

    def connect(url: str, timeout_s: float) -> None:
        raise next(answers)

    monkeypatch.setattr(leaving, "connect", connect)
    assert run("outlive", "--port", "1", "--limit", "5") == 0
    assert next(answers, None) is None


def test_series_that_it_reads_are_the_routers() -> None:
    assert {checking.DECISIONS, checking.RECOVERIES} <= {spec.name for spec in ROUTER}


def test_leases_that_it_waits_for_are_gauges_of_the_connectors() -> None:
    assert set(leaving.LEASES) <= {spec.name for spec in (*KV, *EC) if spec.kind == "gauge"}


def test_it_starts_without_the_suites_libraries() -> None:
    heavy = ("pydantic", "aiohttp", "yaml")
    code = f"import sys, vllm_suite.fleet.pod.command; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
