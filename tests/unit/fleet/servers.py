"""Programs that tests run in place of an instance: they start in a tenth of a second and do what they are told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from vllm_suite.fleet.launch import Launch
from vllm_suite.fleet.spec import LocalSpec, PoolRole

# Serves /health; GET /exit?N ends the process with status N. Started with `fail` it ends at once, with `never` it
# is never ready, with `deaf` neither that nor moved by SIGTERM, with `child` it has a child.
SERVER = """
import http.server, os, signal, subprocess, sys
port, mode = int(sys.argv[1]), sys.argv[2]
print("hello from", port, flush=True)
if mode == "fail":
    sys.exit("no such model: nowhere")
if mode == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "child":
    subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/exit"):
            os._exit(int(self.path.partition("?")[2]))
        self.send_response(200 if mode not in ("never", "deaf") else 503)
        self.end_headers()
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

# An instance as a router sees it: takes completions, of which `max_tokens` are the tenths of a second that one takes,
# and says what runs in it. Where the file `kv` lies in its folder, as many leases of blocks as that says are
# outstanding, where `ec` does, of encoder outputs; where `fail` does, it does not start. Its role can be switched,
# except where `back` lies there; into `listed` it writes whether the router may send to it meanwhile.
ENGINE = """
import http.server, json, os, pathlib, sys, threading, time
port, name, role, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3], pathlib.Path(sys.argv[4])
if (folder / (name + ".fail")).exists():
    sys.exit("no such model: nowhere")
epoch, running, lock = str(time.time_ns()), 0, threading.Lock()
switches, last, can = 0, None, ["prefill", "decode", "any"] if role == "any" else [role]
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def say(self, status, body, kind="application/json"):
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def do_GET(self):
        load = {"running": 0, "waiting": 0}
        state = {"instance_id": name, "epoch": epoch, "role": role, "ready": True, "models": ["tiny"], "load": load,
                 "running": {"decode": running}, "role_epoch": switches, "phase": "serving", "can": can, "last": last}
        if self.path == "/metrics":
            kept = {kind: folder / (name + "." + kind) for kind in ("kv", "ec")}
            left = {kind: path.read_text() if path.exists() else "0" for kind, path in kept.items()}
            text = "".join(f"vllm_suite_{kind}_leases_outstanding {count}\\n" for kind, count in left.items())
            self.say(200, text, "text/plain")
        else:
            self.say(200, json.dumps(state))
    def do_POST(self):
        global running, role, switches, last
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/suite/v1/role":
            (folder / (name + ".listed")).write_text(str(not (folder / "withdrawn").exists()))
            if (body["epoch"], body["role_epoch"]) != (epoch, switches):
                return self.say(409, json.dumps({"outcome": "refused", "error": "stale"}))
            last = {"attempt": 1, "outcome": "switched", "reason": None}
            if (folder / (name + ".back")).exists():
                last |= {"outcome": "back", "reason": "the probe failed"}
            else:
                role, switches = body["role"], switches + 1
            return self.say(202, json.dumps({"outcome": "begun", "epoch": epoch, "last": last}))
        with lock:
            running += 1
        try:
            time.sleep(body["max_tokens"] / 10)
            params = body.get("kv_transfer_params") and {"do_remote_prefill": True, "remote_engine_id": name}
            choice = {"index": 0, "text": name, "finish_reason": "length"}
            self.say(200, json.dumps({"id": "x", "object": "text_completion", "created": 1, "model": "tiny",
                                      "choices": [choice], "kv_transfer_params": params,
                                      "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}}))
        finally:
            with lock:
                running -= 1
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def engine(folder: Path, port: int, name: str, role: PoolRole) -> Launch:
    """A launch of ENGINE."""
    return Launch(
        name=name,
        role=role,
        argv=(sys.executable, "-I", "-S", "-c", ENGINE, str(port), name, role, str(folder)),
        url=f"http://127.0.0.1:{port}",
        log=folder / f"{name}.log",
        ready="state",
        ports=(port,),
    )


def server(folder: Path, port: int, mode: str = "serve", name: str = "one") -> Launch:
    """A launch of SERVER."""
    return Launch(
        name=name,
        role="any",
        argv=(sys.executable, "-I", "-S", "-c", SERVER, str(port), mode),
        url=f"http://127.0.0.1:{port}",
        log=folder / f"{name}.log",
        ready="health",
        ports=(port,),
    )


def local(folder: Path, **over: object) -> LocalSpec:
    """Settings with short times."""
    restart = {"first_delay": "50ms", "max_delay": "200ms", "max_restarts": 3, "reset_after": "1h"}
    return LocalSpec.model_validate(
        {"log_dir": str(folder), "start_timeout": "10s", "stop_timeout": "2s", "restart": restart, **over}
    )


def alive(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether the condition becomes true in time."""
    import time

    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
