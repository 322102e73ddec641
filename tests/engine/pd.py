"""Two real engines, one prefilling and one decoding, in one process tree.

The parent imports vLLM once and forks; each child builds an in-process engine with ``SuiteNixlConnector`` and
obeys commands over a pipe. NIXL moves the KV between the two processes as it does between two servers.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PREFILL_PARAMS = {"do_remote_decode": True, "do_remote_prefill": False}
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


def free_port() -> int:
    """A free port below those the system hands out, so that no outgoing connection takes it before it is used."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def prompt(tokens: int, seed: int) -> list[int]:
    """A reproducible random prompt of the tiny model's ordinary tokens."""
    rng = random.Random(seed)
    return [rng.randrange(16, 500) for _ in range(tokens)]


def import_engine() -> None:
    """Import in the parent what every child needs, before any thread exists."""
    for module in (
        "vllm",
        "vllm.entrypoints.llm",
        "vllm.model_executor.models.llama",
        "vllm.v1.engine.llm_engine",
        "vllm.v1.worker.cpu_model_runner",
        "vllm.v1.worker.cpu_worker",
        "nixl._api",
    ):
        importlib.import_module(module)


@dataclass
class Result:
    """One finished request, as the engine reported it."""

    tokens: list[int]
    finish_reason: str | None
    kv: dict[str, Any] | None
    seconds: float


@dataclass
class Spec:
    """One child engine."""

    name: str
    model: Path
    suite: dict[str, Any] = field(default_factory=dict)
    policy: str = "recompute"
    connector: str = "SuiteNixlConnector"
    prefix_caching: bool = False
    blocks: int = 96
    env: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    llm: dict[str, Any] = field(default_factory=dict)


class Engine:
    """Parent's handle of a child engine."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.side_port = int(spec.env.get("VLLM_NIXL_SIDE_CHANNEL_PORT") or free_port())
        context = mp.get_context("fork")
        self.pipe, child_end = context.Pipe()
        self.process = context.Process(target=_child, args=(child_end, spec, self.side_port), daemon=True)
        self.process.start()
        child_end.close()

    def wait_ready(self) -> None:
        if not self.pipe.poll(START_TIMEOUT_S):
            raise TimeoutError(f"engine {self.spec.name} did not start in {START_TIMEOUT_S:.0f} s")
        answer = self.pipe.recv()
        if answer != "ready":
            raise RuntimeError(f"engine {self.spec.name} did not start: {answer}")

    def send(self, *message: Any) -> None:
        self.pipe.send(message)

    def receive(self, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        if not self.pipe.poll(timeout_s):
            raise TimeoutError(f"engine {self.spec.name} did not answer in {timeout_s:.0f} s")
        kind, value = self.pipe.recv()
        if kind == "error":
            raise RuntimeError(f"engine {self.spec.name}: {value}")
        return value

    def generate(
        self,
        tokens: list[int],
        kv: dict[str, Any] | None = None,
        max_tokens: int = 8,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Result:
        self.send("generate", tokens, kv, max_tokens)
        result = self.receive(timeout_s)
        assert isinstance(result, Result)
        return result

    def generate_many(self, batch: list[tuple[list[int], dict[str, Any] | None]], max_tokens: int = 8) -> list[Result]:
        self.send("generate_many", batch, max_tokens)
        results: list[Result] = self.receive()
        return results

    def prefill(self, tokens: list[int]) -> dict[str, Any]:
        kv = self.generate(tokens, dict(PREFILL_PARAMS), 1).kv
        assert kv is not None
        return kv

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


@contextlib.contextmanager
def engines(*specs: Spec) -> Iterator[list[Engine]]:
    """Start engines side by side and end them afterwards, whatever happened."""
    import_engine()
    started: list[Engine] = []
    try:
        started.extend(Engine(spec) for spec in specs)
        for engine in started:
            engine.wait_ready()
        yield started
    finally:
        for engine in started:
            engine.close()


# --- in the child ---


def _child(pipe: Connection, spec: Spec, side_port: int) -> None:
    os.environ.update(ENGINE_ENV)
    os.environ["VLLM_SUITE_INSTANCE_ID"] = spec.name
    os.environ["VLLM_SUITE_EPOCH"] = os.urandom(8).hex()
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(side_port)
    os.environ.update(spec.env)
    try:
        llm = _make_llm(spec)
    except BaseException:  # noqa: BLE001  the parent reports it
        pipe.send(traceback.format_exc())
        os._exit(1)
    pipe.send("ready")
    while True:
        while not pipe.poll(0.002):
            llm.llm_engine.step()
        try:
            message = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send(("ok", _obey(llm, *message)))
        except BaseException:  # noqa: BLE001  the parent reports it
            pipe.send(("error", traceback.format_exc()))


def _make_llm(spec: Spec) -> Any:
    from vllm import LLM

    transfer: dict[str, Any] = {
        "kv_connector": spec.connector,
        "kv_role": "kv_both",
        "kv_buffer_device": "cpu",
        "kv_load_failure_policy": spec.policy,
        "kv_connector_extra_config": {**spec.extra, "suite": spec.suite},
    }
    if spec.connector == "SuiteNixlConnector":
        transfer["kv_connector_module_path"] = "vllm_disagg.connector"
    else:
        transfer["kv_connector_extra_config"] = spec.extra
    options: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "num_gpu_blocks_override": spec.blocks,
        "kv_cache_memory_bytes": 64 << 20,
        "block_size": 32,
        "enable_prefix_caching": spec.prefix_caching,
        "disable_log_stats": False,
        "kv_transfer_config": transfer,
    }
    return LLM(str(spec.model), **{**options, **spec.llm})


def _obey(llm: Any, command: str, *args: Any) -> Any:
    if command == "generate":
        return _generate(llm, *args)
    if command == "generate_many":
        return _generate_many(llm, *args)
    if command == "call":
        function, rest = args
        return function(llm, *rest)
    raise ValueError(command)


def _generate(llm: Any, tokens: list[int], kv: dict[str, Any] | None, max_tokens: int) -> Result:
    return _generate_many(llm, [(tokens, kv)], max_tokens)[0]


def _generate_many(llm: Any, batch: list[tuple[list[int], dict[str, Any] | None]], max_tokens: int) -> list[Result]:
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,  # some models of the tests have no tokenizer
            extra_args={"kv_transfer_params": kv} if kv is not None else None,
        )
        for _, kv in batch
    ]
    begun = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": tokens} for tokens, _ in batch], params, use_tqdm=False)
    seconds = time.perf_counter() - begun
    return [
        Result(list(o.outputs[0].token_ids), o.outputs[0].finish_reason, o.kv_transfer_params, seconds) for o in outputs
    ]


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
