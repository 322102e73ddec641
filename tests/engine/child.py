"""Real engines, each in a process of its own, as the tests of every plugin start them.

The parent imports vLLM once and forks; each child builds an in-process engine and obeys commands over a pipe. What a
plugin's tests add lies beside this: `pd` (KV), `epd_engine` (encoder outputs), `dler_engine` (order of requests).
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing as mp
import os
import random
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

START_TIMEOUT_S = 180.0
CALL_TIMEOUT_S = 90.0

ENGINE_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "NIXL_LOG_LEVEL": "WARN",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
    "VLLM_HOST_IP": "127.0.0.1",
    "UCX_RCACHE_MAX_UNRELEASED": "1024",
    "CUDA_VISIBLE_DEVICES": "",
}
# Arguments of `vllm.LLM` for a tiny model on the CPU.
TINY: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 2048,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 64 << 20,
    "block_size": 32,
    "enable_prefix_caching": False,
    "disable_log_stats": False,
}
_MODULES = (
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.model_executor.models.llama",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.cpu_worker",
    "nixl._api",
)


def free_port() -> int:
    """A free port below those the system hands out, so that no outgoing connection takes it before it is used."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def import_engine(*more: str) -> None:
    """Import in the parent what every child needs, and ``more`` modules, before any thread exists."""
    for module in (*_MODULES, *more):
        importlib.import_module(module)


class Named(Protocol):
    """A description of an engine."""

    name: str


class Child:
    """Parent's handle of a child engine.

    Args:
        main: runs in the child as ``main(pipe, spec, *args)``; calls `serve`.
    """

    def __init__(self, main: Callable[..., None], spec: Named, *args: Any) -> None:
        self.name = spec.name
        context = mp.get_context("fork")
        self.pipe, child_end = context.Pipe()
        self.process = context.Process(target=main, args=(child_end, spec, *args), daemon=True)
        self.process.start()
        child_end.close()

    def wait_ready(self) -> None:
        if not self.pipe.poll(START_TIMEOUT_S):
            raise TimeoutError(f"engine {self.name} did not start in {START_TIMEOUT_S:.0f} s")
        answer = self.pipe.recv()
        if answer != "ready":
            raise RuntimeError(f"engine {self.name} did not start: {answer}")

    def send(self, *message: Any) -> None:
        self.pipe.send(message)

    def receive(self, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        if not self.pipe.poll(timeout_s):
            raise TimeoutError(f"engine {self.name} did not answer in {timeout_s:.0f} s")
        kind, value = self.pipe.recv()
        if kind == "error":
            raise RuntimeError(f"engine {self.name}: {value}")
        return value

    def call(self, function: Callable[..., Any], *args: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Run ``function(llm, *args)`` in the child; ``function`` is a module-level function."""
        self.send("call", function, args)
        return self.receive(timeout_s)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the children of a metric whose labels match; the count for a histogram."""
        total: float = self.call(_metric, name, labels)
        return total

    def kill(self, sig: int = signal.SIGKILL) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, sig)
        deadline = time.monotonic() + 5
        while sig == signal.SIGSTOP and not _stopped(self.process.pid):
            # One thread is told to stop the others; until it runs, they go on answering.
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.kill(signal.SIGCONT)
            self.kill()
        self.process.join(10)
        self.pipe.close()


def _stopped(pid: int) -> bool:
    states = [stat.read_text().rsplit(")", 1)[1].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    return set(states) == {"T"}


Kind = TypeVar("Kind", bound=Child)
OneSpec = TypeVar("OneSpec")


@contextlib.contextmanager
def side_by_side(kind: Callable[[OneSpec], Kind], specs: Sequence[OneSpec], *modules: str) -> Iterator[list[Kind]]:
    """Start engines side by side and end them afterwards, whatever happened."""
    import_engine(*modules)
    started: list[Kind] = []
    try:
        started.extend(kind(spec) for spec in specs)
        for engine in started:
            engine.wait_ready()
        yield started
    finally:
        for engine in started:
            engine.close()


# --- in the child ---


def environment(name: str, *more: Mapping[str, str]) -> None:
    """What an engine finds in its environment: who it is, and ``more``."""
    os.environ.update(ENGINE_ENV)
    os.environ["VLLM_SUITE_INSTANCE_ID"] = name
    os.environ["VLLM_SUITE_EPOCH"] = os.urandom(8).hex()
    for variables in more:
        os.environ.update(variables)


def serve(
    pipe: Connection,
    make: Callable[[], Any],
    commands: Mapping[str, Callable[..., Any]] | None = None,
    *,
    idle_steps: bool = True,
) -> None:
    """Make the engine and obey: each command is ``commands[name](llm, *args)`` or ``call``. Returns never.

    ``idle_steps``: between two commands the engine makes steps, as one that serves others does.
    """
    try:
        llm = make()
    except BaseException:  # noqa: BLE001  the parent reports it
        pipe.send(traceback.format_exc())
        os._exit(1)
    pipe.send("ready")
    known = {"call": _call, **(commands or {})}
    while True:
        while idle_steps and not pipe.poll(0.002):
            llm.llm_engine.step()
        try:
            command, *args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send(("ok", known[command](llm, *args)))
        except BaseException:  # noqa: BLE001  the parent reports it
            pipe.send(("error", traceback.format_exc()))


def _call(llm: Any, function: Callable[..., Any], args: Sequence[Any]) -> Any:
    return function(llm, *args)


def scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def free_blocks(llm: Any) -> int:
    return int(scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks())


def _metric(llm: Any, name: str, labels: dict[str, str]) -> float:
    from prometheus_client import REGISTRY

    total = 0.0
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name == name and all(sample.labels.get(k) == v for k, v in labels.items()):
                total += sample.value
    return total
