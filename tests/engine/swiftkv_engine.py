"""Engines with SwiftKV models, each in a forked process, watched step by step and compared with the plain reference.

The parent imports vLLM once and forks; a child builds an in-process engine and obeys calls over a pipe. `run` drives
requests that arrive at given steps and reports, beside tokens and log-probabilities, what the scheduler scheduled
and what the model computed, so that a test can compare the two.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing as mp
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from child import import_engine
from swiftkv_child import BLOCK, Answer, Ask, Report, Spec, child, drive, poison, runner
from swiftkv_compare import (
    TOLERANCE,
    close,
    compare,
    logprobs,
    matches,
    reference,
    skipped_exactly,
    skipped_nothing,
    tokens,
)

# Tests take everything from here.
__all__ = [
    "BLOCK",
    "TOLERANCE",
    "Answer",
    "Ask",
    "Engine",
    "EngineError",
    "Report",
    "Spec",
    "close",
    "compare",
    "drive",
    "engine",
    "logprobs",
    "matches",
    "poison",
    "reference",
    "refusal",
    "runner",
    "skipped_exactly",
    "skipped_nothing",
    "tokens",
]

START_TIMEOUT_S = 240.0
CALL_TIMEOUT_S = 240.0


def register_models() -> None:
    """What the bootstrap does by name, done with the classes themselves: no process is started to inspect them."""
    from vllm import ModelRegistry

    import vllm_swiftkv
    from vllm_swiftkv import configs, families

    configs.register()
    for family in families.FAMILIES:
        ModelRegistry.register_model(family.architecture, getattr(vllm_swiftkv, family.architecture))


class Engine:
    """Parent's handle of a child engine."""

    def __init__(self, spec: Spec) -> None:
        context = mp.get_context("fork")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=child, args=(end, spec), daemon=True)
        self.process.start()
        end.close()

    def receive(self, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        if not self.pipe.poll(timeout_s):
            raise TimeoutError(f"the engine did not answer in {timeout_s:.0f} s")
        kind, value = self.pipe.recv()
        if kind != "ok":
            raise EngineError(*value)
        return value

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(llm, *args)`` in the child; a module-level function."""
        self.pipe.send((function, args))
        return self.receive()

    def run(self, asks: Sequence[Ask]) -> Report:
        report = self.call(drive, list(asks))
        assert isinstance(report, Report)
        return report

    def close(self) -> None:
        self.process.kill()
        self.process.join(10)
        self.pipe.close()


class EngineError(Exception):
    """What a child raised: the type's name, its text, the traceback."""

    def __init__(self, kind: str, text: str, trace: str) -> None:
        super().__init__(f"{kind}: {text}\n{trace}")
        self.kind, self.text = kind, text


@contextlib.contextmanager
def engine(model: Path, **options: Any) -> Iterator[Engine]:
    """A running engine; see `Spec`. Raises EngineError where it does not start."""
    prepare_parent()
    started = Engine(Spec(model, **options))
    try:
        started.receive(START_TIMEOUT_S)
        yield started
    finally:
        started.close()


def refusal(model: Path, **options: Any) -> EngineError:
    """The error of an engine that must not start."""
    try:
        with engine(model, **options):
            pass
    except EngineError as error:
        return error
    raise AssertionError("the engine started")


@functools.cache
def prepare_parent() -> None:
    """Import once what children need. One thread, since a forked child cannot use its parent's OpenMP threads."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    torch.set_num_threads(1)
    import_engine()
    for module in ("vllm.v1.core.sched.scheduler", "vllm_swiftkv.models.qwen3_moe"):
        importlib.import_module(module)
    register_models()
