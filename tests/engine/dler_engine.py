"""Real engines side by side, stock and length-aware, each in a process of its own; see :mod:`child`."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from child import CALL_TIMEOUT_S, TINY, Child, environment, scheduler, serve, side_by_side
from pd import prompt

STOCK = None
OURS = "vllm_suite.compat.scheduler.make_scheduler"
AHEAD = "dler_engine.make_ahead"
STOCK_AHEAD = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"


@dataclass
class Ask:
    """One request of a batch; ``options`` are vLLM's sampling parameters."""

    tokens: int
    seed: int
    name: str | None = None
    max_tokens: int = 8
    priority: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    xargs: dict[str, Any] = field(default_factory=dict)
    shared: int = 0
    """Tokens at the front that all requests have in common."""

    @property
    def prompt(self) -> list[int]:
        return prompt(self.shared, 999) + prompt(self.tokens - self.shared, self.seed)


@dataclass
class Answer:
    """One finished request: tokens of each sample, how each ended, and the place among those that finished."""

    tokens: list[list[int]]
    reasons: list[str | None]
    place: int


@dataclass
class Spec:
    """One child engine; ``llm`` are vLLM's own arguments, ``suite`` the scheduler's settings."""

    name: str
    model: Path
    scheduler: str | None
    suite: dict[str, Any] = field(default_factory=dict)
    llm: dict[str, Any] = field(default_factory=dict)


class DlerEngine(Child):
    """Parent's handle of a child engine."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(_child, spec)

    def ask(
        self, asks: Sequence[Ask], aborts: dict[int, int] | None = None, reset_after: int | None = None
    ) -> list[Answer | None]:
        """Send requests together and wait for all of them.

        ``aborts`` maps a request to the engine step after which it is aborted (its answer is None); after step
        ``reset_after`` all running requests are sent back to the queue.
        """
        return self.call(_run, list(asks), aborts or {}, reset_after, timeout_s=CALL_TIMEOUT_S)  # type: ignore[no-any-return]


@contextlib.contextmanager
def engines(*specs: Spec) -> Iterator[list[DlerEngine]]:
    """Start engines side by side and end them afterwards, whatever happened."""
    with side_by_side(DlerEngine, specs) as started:
        yield started


# --- in the child ---


def make_ahead(*, vllm_config: Any, **kwargs: Any) -> Any:
    """Ours over the scheduler that runs a step ahead, which the CPU platform switches off by itself."""
    from vllm_suite.compat.scheduler import make_scheduler

    vllm_config.scheduler_config.async_scheduling = True
    try:
        return make_scheduler(vllm_config=vllm_config, **kwargs)
    finally:
        vllm_config.scheduler_config.async_scheduling = False


def _child(pipe: Connection, spec: Spec) -> None:
    environment(spec.name, {"VLLM_SUITE_PLUGINS": "dler"} if spec.scheduler in (OURS, AHEAD) else {})
    serve(pipe, lambda: _make_llm(spec), idle_steps=False)


def _make_llm(spec: Spec) -> Any:
    from vllm import LLM

    options: dict[str, Any] = {
        **TINY,
        "max_model_len": 1024,
        "max_num_seqs": 4,
        "num_gpu_blocks_override": 64,
        "scheduler_cls": spec.scheduler,
        "additional_config": {"suite": {"dler": spec.suite}} if spec.suite else {},
    }
    return LLM(str(spec.model), **{**options, **spec.llm})


def _run(llm: Any, asks: list[Ask], aborts: dict[int, int], reset_after: int | None) -> list[Answer | None]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    engine, answers, steps = llm.llm_engine, {}, 0
    tag = os.urandom(4).hex()
    for number, ask in enumerate(asks):
        options = {"temperature": 0.0, "ignore_eos": True, "max_tokens": ask.max_tokens, **ask.options}
        if "choice" in options:
            options["structured_outputs"] = StructuredOutputsParams(choice=options.pop("choice"))
        extra = ask.xargs | ({"dler_class": ask.name} if ask.name else {})
        # All samples of a request come together.
        params = SamplingParams(**options, extra_args=extra or None, output_kind=RequestOutputKind.FINAL_ONLY)
        engine.add_request(f"{tag}-{number}", {"prompt_token_ids": ask.prompt}, params, priority=ask.priority)
    deadline = time.monotonic() + CALL_TIMEOUT_S
    while engine.has_unfinished_requests():
        assert time.monotonic() < deadline, sorted(answers)
        for output in engine.step():
            if output.finished:
                samples = sorted(output.outputs, key=lambda sample: sample.index)
                tokens = [list(sample.token_ids) for sample in samples]
                number = int(output.request_id.rpartition("-")[2])
                answers[number] = Answer(tokens, [sample.finish_reason for sample in samples], len(answers))
        steps += 1
        gone = [f"{tag}-{number}" for number, step in aborts.items() if step == steps]
        if gone:
            engine.abort_request(gone)
        if steps == reset_after:
            assert scheduler(llm).reset_prefix_cache(reset_running_requests=True)
    left = scheduler(llm)
    assert (len(left.running), len(left.waiting), len(left.kv_holding_waiting)) == (0, 0, 0)
    return [answers.get(number) for number in range(len(asks))]
