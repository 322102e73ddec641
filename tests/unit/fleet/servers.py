"""Programs that tests run in place of an instance: they start in a tenth of a second and do what they are told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from vllm_suite.fleet.launch import Launch
from vllm_suite.fleet.spec import LocalSpec

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
