"""`GET /suite/v1/state` of a real `vllm serve` that is configured by YAML, beside a foreign endpoint plugin."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from child import free_port
from served import Server, start

KEY = "the-key"
ENGINE_DEADLINE_S = 2.0
FOREIGN = """
class Routes:
    name = "foreign_routes"
    required_tasks = None
    def attach_router(self, app): app.add_api_route("/foreign", lambda: "open", methods=["GET"])
    async def init_state(self, engine_client, state, args): pass
"""


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    work = tmp_path_factory.mktemp("serve")
    info = work / "foreign-1.0.dist-info"
    info.mkdir()
    (work / "foreign.py").write_text(FOREIGN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.endpoint_plugins]\nforeign_routes = foreign:Routes\n")
    port = free_port()
    config = work / "serve.yaml"
    config.write_text(
        f"model: {model}\nplugins: disagg\nport: {port}\nhost: 127.0.0.1\nserved-model-name: tiny\n"
        "enforce-eager: true\nkv-cache-memory-bytes: 67108864\nmax-model-len: 2048\nmax-num-seqs: 1\n"
        f"api-key: {KEY}\n"
    )
    env = {
        "PYTHONPATH": str(work),
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
        "VLLM_SUITE_ROLE": "prefill",
        "VLLM_SUITE_INSTANCE_ID": "p0",
        "VLLM_SUITE_ENGINE_DEADLINE_S": str(ENGINE_DEADLINE_S),
    }
    with start(["--config", str(config)], port, work / "serve.log", env, KEY) as one:
        one.wait_ready()
        yield one


def wait(server: Server, condition: Callable[[dict[str, Any]], bool], timeout_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while not condition(state := server.state()):
        assert time.monotonic() < deadline, state
        time.sleep(0.02)
    return state


def engine_pid(server: Server) -> int:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().partition("(")[2].rpartition(")")
            if name.startswith("VLLM::EngineCor") and int(rest.split()[1]) == server.process.pid:
                return int(path.parent.name)
    raise AssertionError("the server has no engine process")


def test_the_state_names_the_instance(server: Server) -> None:
    state = wait(server, lambda s: bool(s["ready"]), 10)
    assert {k: state[k] for k in ("instance_id", "role", "draining", "models", "max_model_len", "plugins")} == {
        "instance_id": "p0",
        "role": "prefill",
        "draining": False,
        "models": ["tiny"],
        "max_model_len": 2048,
        "plugins": ["disagg"],
    }
    assert state["kv_connector"] == "SuiteNixlConnector"
    assert state["prefix_caching"] is True
    assert state["block_size"] >= 16
    assert len(state["epoch"]) == 16
    assert state["load"] == {"running": 0, "waiting": 0, "kv_usage": 0.0, "waiting_tokens": 0}
    assert state["vllm"].startswith("0.3")


@pytest.mark.parametrize("key", [None, "", "the-kex", "the-key2"])
def test_without_the_key_nothing_is_told(server: Server, key: str | None) -> None:
    status, body = server.request("/suite/v1/state", key=key)
    assert status == 401
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}


def test_foreign_routes_stay_closed(server: Server) -> None:
    assert server.request("/foreign")[0] == 404


def test_load_follows_the_requests(server: Server) -> None:
    body = {"model": "tiny", "prompt": [20] * 300, "max_tokens": 300, "ignore_eos": True}
    before = wait(server, lambda s: s["load"]["running"] == 0, 10)["work"]
    with ThreadPoolExecutor(8) as pool:  # two and more wait for so long that a state asked for between sees it
        answers = [pool.submit(server.request, "/v1/completions", KEY, body) for _ in range(8)]
        busy = wait(server, lambda s: s["load"]["running"] == 1 and s["load"]["waiting"] >= 2, 30)
        assert busy["load"]["kv_usage"] > 0
        assert busy["load"]["waiting_tokens"] >= 600
        assert [answer.result(120)[0] for answer in answers] == [200] * 8
    idle = wait(server, lambda s: s["load"]["running"] == 0, 10)
    assert (idle["load"]["waiting"], idle["load"]["waiting_tokens"]) == (0, 0)
    # What the controller of role switching takes rates and lengths from.
    after = idle["work"]
    done = {name: after[name] - before.get(name, 0) for name in after if name != "arrived"}
    assert done == {"finished": 8, "prompt_tokens": 8 * 300, "output_tokens": 8 * 300, "generated": 8 * 300}
    assert after["arrived"]["unknown"] - before["arrived"]["unknown"] == 8


def test_an_engine_that_does_not_answer_is_not_ready(server: Server) -> None:
    wait(server, lambda s: bool(s["ready"]), 10)
    engine = engine_pid(server)
    os.kill(engine, signal.SIGSTOP)
    try:
        wait(server, lambda s: not s["ready"], ENGINE_DEADLINE_S + 3)
    finally:
        os.kill(engine, signal.SIGCONT)
    wait(server, lambda s: bool(s["ready"]), 10)


def test_one_line_says_what_was_set_and_polls_are_not_logged(server: Server) -> None:
    log = server.log.read_text()
    [line] = [line for line in log.splitlines() if "vllm-suite" in line and "set --kv-transfer-config" in line]
    assert '"kv_role": "kv_producer"' in line
    assert "Unknown vLLM environment variable" not in log
    assert '/suite/v1/state HTTP/1.1" 200' not in log
    assert '/suite/v1/state HTTP/1.1" 401' in log
    assert KEY not in "\n".join(text for text in log.splitlines() if "vllm-suite" in text)
