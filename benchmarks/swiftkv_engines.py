"""Engines that take turns: each in a process of its own, all alive, one working at a time.

The parent imports vLLM once and forks. A child builds its engine in its own process (no server, no engine-core
process), so that a step costs what the model and vLLM's scheduler cost, and sleeps while it is not asked.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing as mp
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 900.0
ENGINE_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # warnings of the missing tokenizer, with tracebacks
    "VLLM_HOST_IP": "127.0.0.1",
}


@dataclass(frozen=True)
class Spec:
    """One engine.

    Attributes:
        config: the model's ``config.json``; weights are random.
        skip: arm the skip; None for an ordinary model, which is started without the plugin.
        options: of ``vllm.LLM``.
    """

    name: str
    config: dict[str, Any]
    skip: bool | None
    threads: int
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """What one batch of requests took, in seconds from the moment all of them were handed over.

    Attributes:
        prefill: until the last of them had its first token; ``prefill_cpu`` is CPU time of the engine's process.
        decode: from then until the end, per output token; ``decode_cpu`` likewise.
        step: median gap between two tokens of the first request.
        tokens: output tokens of the first request.
    """

    prefill: float
    prefill_cpu: float
    decode: float
    decode_cpu: float
    step: float
    tokens: list[int]


class Engine:
    """Parent's handle of an engine."""

    def __init__(self, spec: Spec, folder: Path) -> None:
        self.spec = spec
        context = mp.get_context("fork")
        self.pipe, child_end = context.Pipe()
        # No daemon: a tensor-parallel engine has processes of its own.
        self.process = context.Process(target=_child, args=(child_end, self.pipe, spec, folder))
        self.process.start()
        child_end.close()

    def wait_ready(self) -> None:
        self._receive(START_TIMEOUT_S)

    def run(self, prompts: list[list[int]], outputs: int, timeout_s: float = 600.0) -> Timing:
        """Compute all prompts at once and ``outputs`` tokens of each."""
        self.pipe.send(("run", prompts, outputs))
        timing = self._receive(timeout_s)
        assert isinstance(timing, Timing)
        return timing

    def open(self, prompt: list[int], outputs: int) -> None:
        """Prefill one request and leave it decoding; `steps` goes on with it. One at a time."""
        self.pipe.send(("open", prompt, outputs))
        self._receive(600.0)

    def steps(self, count: int) -> tuple[float, float]:
        """``count`` decode steps after one that wakes the engine up: wall and CPU seconds per step."""
        self.pipe.send(("steps", count))
        taken: tuple[float, float] = self._receive(600.0)
        return taken

    def end(self) -> None:
        """Drop the request of `open`."""
        self.pipe.send(("end",))
        self._receive(60.0)

    def counters(self) -> dict[str, int]:
        """The plugin's counters; empty for an ordinary model."""
        self.pipe.send(("counters",))
        counted: dict[str, int] = self._receive(60.0)
        return counted

    def profile(self, prompts: list[list[int]], outputs: int) -> str:
        """A table of where a run's time goes, by torch's profiler."""
        self.pipe.send(("profile", prompts, outputs))
        table: str = self._receive(600.0)
        return table

    def _receive(self, timeout_s: float) -> Any:
        if not self.pipe.poll(timeout_s):
            raise TimeoutError(f"engine {self.spec.name} did not answer in {timeout_s:.0f} s")
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"engine {self.spec.name} died") from None
        if kind == "error":
            raise RuntimeError(f"engine {self.spec.name}: {value}")
        return value

    def close(self) -> None:
        self.pipe.close()
        self.process.join(20)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(10)


@contextlib.contextmanager
def engines(specs: list[Spec], folder: Path) -> Iterator[dict[str, Engine]]:
    """Start engines one after the other and end them afterwards, whatever happened. By name."""
    os.environ.update(ENGINE_ENV)
    for module in ("vllm", "vllm.entrypoints.llm", "vllm.model_executor.models.llama", "vllm.v1.engine.llm_engine"):
        importlib.import_module(module)
    started: dict[str, Engine] = {}
    try:
        for spec in specs:
            begun = time.monotonic()
            started[spec.name] = engine = Engine(spec, folder)
            engine.wait_ready()
            print(f"engine {spec.name}: started in {time.monotonic() - begun:.0f} s", file=sys.stderr)
        yield started
    finally:
        for engine in started.values():
            engine.close()


# --- in the child ---


def _child(pipe: Connection, parents_end: Connection, spec: Spec, folder: Path) -> None:
    parents_end.close()  # else the pipe would stay open after the parent's death
    os.environ["OMP_NUM_THREADS"] = str(spec.threads)
    if spec.skip is not None:
        os.environ["VLLM_SUITE_PLUGINS"] = "swiftkv"
    try:
        llm = _make_llm(spec, folder)
    except BaseException:  # noqa: BLE001  the parent reports it
        pipe.send(("error", traceback.format_exc()))
        os._exit(1)
    pipe.send(("ok", None))
    while True:
        try:
            command, *rest = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send(("ok", _COMMANDS[command](llm, *rest)))
        except BaseException:  # noqa: BLE001  the parent reports it
            pipe.send(("error", traceback.format_exc()))


def _make_llm(spec: Spec, folder: Path) -> Any:
    import torch
    from vllm import LLM

    if not torch.cuda.is_available():
        torch.set_num_threads(spec.threads)
    model = folder / spec.name
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(spec.config, indent=2) + "\n")
    options: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    if spec.skip is not None:
        options["additional_config"] = {"suite": {"swiftkv": {"skip": spec.skip}}}
    return LLM(str(model), **{**options, **spec.options})


def _run(llm: Any, prompts: list[list[int]], outputs: int) -> Timing:
    from vllm import SamplingParams

    engine, names = llm.llm_engine, [f"{time.monotonic_ns()}-{i}" for i in range(len(prompts))]
    params = SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True, detokenize=False)
    left, gaps, tokens = set(names), [], []
    begun, begun_cpu = time.perf_counter(), time.process_time()
    filled = filled_cpu = before = now = begun
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            now = time.perf_counter()
            if output.request_id in left:
                left.remove(output.request_id)
                filled, filled_cpu = now, time.process_time()
            elif output.request_id == names[0]:
                gaps.append(now - before)
            if output.request_id == names[0]:
                before, tokens = now, list(output.outputs[0].token_ids)
    ended_cpu, more = time.process_time(), max(1, outputs - 1)
    return Timing(
        prefill=filled - begun,
        prefill_cpu=filled_cpu - begun_cpu,
        decode=(now - filled) / more,
        decode_cpu=(ended_cpu - filled_cpu) / more,
        step=statistics.median(gaps) if gaps else 0.0,
        tokens=tokens,
    )


_OPEN = "decoding"


def _open(llm: Any, prompt: list[int], outputs: int) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request(_OPEN, {"prompt_token_ids": prompt}, params)
    while not llm.llm_engine.step():  # chunks before the last one give no output
        pass


def _steps(llm: Any, count: int) -> tuple[float, float]:
    engine = llm.llm_engine
    engine.step()
    begun, begun_cpu = time.perf_counter(), time.process_time()
    done = sum(len(engine.step()) for _ in range(count))
    if done != count:
        raise RuntimeError(f"{count} steps gave {done} outputs")
    return (time.perf_counter() - begun) / count, (time.process_time() - begun_cpu) / count


def _end(llm: Any) -> None:
    llm.llm_engine.abort_request([_OPEN])
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def _counters(llm: Any) -> dict[str, int]:
    if not llm.llm_engine.vllm_config.parallel_config.worker_extension_cls:
        return {}
    counted: dict[str, int] = llm.collective_rpc("swiftkv_counters")[0]
    return counted


def _profile(llm: Any, prompts: list[list[int]], outputs: int) -> str:
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(activities=activities) as taken:
        _run(llm, prompts, outputs)
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return str(taken.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))


_COMMANDS = {"run": _run, "open": _open, "steps": _steps, "end": _end, "counters": _counters, "profile": _profile}
