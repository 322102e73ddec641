"""CPU time of the processes of one real ``vllm serve``: idle, and while it holds a prefill that nobody pulls."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

START_DEADLINE_S = 200.0
SETTLE_S = 5.0
TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def run_serve(kind: str, model: Path, config: dict[str, Any], folder: Path, seconds: float) -> dict[str, Any]:
    """Start an instance, measure, stop it.

    Raises:
        RuntimeError: it did not become ready; the message ends with its log.
    """
    port, side_port = _free_port(), _free_port()
    env = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port),
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "2048"]
    command += ["--kv-cache-memory-bytes", str(128 << 20), "--kv-transfer-config", json.dumps(config)]
    log = folder / f"{kind}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=env, stdout=stream, stderr=stream, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        begun = time.monotonic()
        _wait_ready(url, process, log)
        ready_s = time.monotonic() - begun
        time.sleep(SETTLE_S)
        idle = cpu_shares(process.pid, seconds)
        affinity = {name: len(os.sched_getaffinity(pid)) for pid, name in processes(process.pid).items()}
        body = {"model": "tiny", "prompt": list(range(16, 316)), "max_tokens": 1, "kv_transfer_params": PREFILL}
        answer = _post(url + "/v1/completions", body)
        if not (answer.get("kv_transfer_params") or {}).get("remote_block_ids"):
            raise RuntimeError(f"no reference in {answer}")
        time.sleep(1.0)
        # Both kinds keep an unclaimed lease for 15 s or more by default.
        held = cpu_shares(process.pid, min(seconds, 10.0))
    finally:
        _stop(process)
    return {
        "idle, cores used": {"text": _shares_text(idle), "shares": idle},
        "an unpulled prefill held, cores used": {"text": _shares_text(held), "shares": held},
        "cores each process may use": {"text": _shares_text(affinity), "cores": affinity},
        "start-up": {"text": f"{ready_s:.0f} s", "seconds": ready_s},
    }


def processes(root: int) -> dict[int, str]:
    """A process and its live descendants by id, with a short name each."""
    found: dict[int, str] = {}
    try:
        words = Path(f"/proc/{root}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        found[root] = _short(words)
        for task in Path(f"/proc/{root}/task").iterdir():
            for child in (task / "children").read_text().split():
                found |= processes(int(child))
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found


def _short(words: str) -> str:
    for name in ("EngineCore", "Worker"):
        if f"VLLM::{name}" in words:
            return name
    if "resource_tracker" in words:
        return "resource tracker"
    return "API" if "serve" in words else words.split(" ")[0][-24:]


def cpu_shares(root: int, seconds: float) -> dict[str, float]:
    """Cores used by each process over ``seconds``; processes of one name are added."""
    before, begun = _cpu_seconds(root), time.monotonic()
    time.sleep(seconds)
    after, elapsed = _cpu_seconds(root), time.monotonic() - begun
    shares: dict[str, float] = {}
    for pid, name in processes(root).items():
        if pid in before and pid in after:
            shares[name] = shares.get(name, 0.0) + (after[pid] - before[pid]) / elapsed
    return shares


def _cpu_seconds(root: int) -> dict[int, float]:
    used = {}
    for pid in processes(root):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        used[pid] = (int(fields[11]) + int(fields[12])) * TICK_S
    return used


def _shares_text(values: dict[str, float] | dict[str, int]) -> str:
    kept = {name: value for name, value in values.items() if name in ("API", "EngineCore", "Worker")}
    return ", ".join(
        f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in kept.items()
    )


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url + "/health", timeout=2.0):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.3)
    raise RuntimeError(f"the instance did not become ready\n{log.read_text(errors='replace')[-3000:]}")


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30.0) as answer:
        result: dict[str, Any] = json.load(answer)
    return result


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number, wait_s in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue
