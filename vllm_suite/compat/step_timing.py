"""Drives a vLLM engine through batches of a given composition and writes how long each step took.

    python -m vllm_suite.compat.step_timing JOB.json OUT.jsonl      # commands as JSON lines on standard input

The engine is vLLM's own, built in this process with its own scheduler, block size and prefix cache, and used through
`LLMEngine`: requests are added, `step` is called, requests are aborted. Nothing is patched. A context is put into a
batch by a prompt whose blocks are in the prefix cache, so that a batch is made for the price of one short step. What a
step really held is read from vLLM's own iteration details; a step that held something else than asked for is marked.

A step's time is the time from the end of the step before (of its own beginning, for the first) to its end, so host work
between two steps belongs to it, and with asynchronous scheduling it is the period in which steps follow each other.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import IO, Any

from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.metrics.loggers import StatLoggerBase

# Sequences that a batch keeps while its steps are timed need room to go on.
_SPARE = 64
_SETUP_STEPS = 400


class Details(StatLoggerBase):
    """Keeps vLLM's account of the last step."""

    latest: Any = None

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Called by vLLM after each step that had statistics."""
        if scheduler_stats is not None and scheduler_stats.iteration_details is not None:
            Details.latest = scheduler_stats.iteration_details

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


class Driver:
    """One engine, its prompts, and the cells that it is asked to run."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.cells: list[dict[str, Any]] = []
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(**job["engine"], enable_prefix_caching=True, enable_logging_iteration_details=True),
            stat_loggers=[Details],
        )
        config = self.engine.vllm_config
        self.block = int(config.cache_config.block_size)
        self.window = int(config.model_config.max_model_len)
        self.synchronous = not config.scheduler_config.async_scheduling
        self._draw = random.Random(job["seed"])
        self._ids = range(*job["token_ids"])
        self._bases: list[list[int]] = []
        self._made = 0
        self._lengths: dict[str, int] = {}
        self.facts = {
            "block_size": self.block,
            "blocks": int(config.cache_config.num_gpu_blocks or 0),
            "max_model_len": self.window,
            "max_num_seqs": int(config.scheduler_config.max_num_seqs),
            "max_num_batched_tokens": int(config.scheduler_config.max_num_batched_tokens),
            "async_scheduling": not self.synchronous,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
        }

    def _base(self, slot: int, length: int) -> list[int]:
        """The start of the text of a slot; equal from call to call, so that its blocks are found again."""
        while len(self._bases) <= slot:
            self._bases.append(self._draw.choices(self._ids, k=self.window))
        return self._bases[slot][:length]

    def _add(self, prompt: list[int], most: int) -> str:
        self._made += 1
        name = f"c{self._made}"
        params = SamplingParams(
            temperature=0.0,
            max_tokens=most,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE,
        )
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        self._lengths[name] = len(prompt)
        return name

    def _step(self) -> tuple[dict[str, int], Any]:
        """Tokens that each request has so far, and what the step held."""
        Details.latest = None
        found = {}
        for output in self.engine.step():
            found[output.request_id] = len(output.outputs[0].token_ids)
        return found, Details.latest

    def _drain(self, names: list[str]) -> None:
        if names:
            self.engine.abort_request(names)
        for _ in range(_SETUP_STEPS):
            if not self.engine.has_unfinished_requests():
                return
            self._step()
        raise RuntimeError("the engine does not become idle")

    def _warm(self, slot: int, before: int) -> None:
        """Put the first `before` tokens of a slot into the prefix cache."""
        if before:
            self._add([*self._base(slot, before), self._ids[0]], 1)
            self._drain([])

    def run(self, index: int) -> list[dict[str, Any]]:
        """One cell, its steps timed."""
        cell = self.cells[index]
        contexts, chunks, count = cell["contexts"], cell["chunks"], cell["steps"]
        first_slot = len(contexts)
        for slot, (_, before) in enumerate(chunks):
            self._warm(first_slot + slot, before)
        names, tokens = self._decoding(contexts, count)
        rows: list[dict[str, Any]] = []
        # With one step scheduled ahead the first step after a change is not yet in the rhythm.
        skip = 0 if self.synchronous else 1
        for number in range(count + skip):
            for slot, (length, before) in enumerate(chunks):
                fresh = self._draw.choices(self._ids, k=length)
                self._add([*self._base(first_slot + slot, before), *fresh], 1)
            keys = [self._lengths[name] + tokens[name] for name in names]
            begun = time.perf_counter()
            found, details = self._step()
            while details is None and self.engine.has_unfinished_requests():
                found, details = self._step()
            seconds = time.perf_counter() - begun
            tokens.update((name, found[name]) for name in names if name in found)
            if number >= skip:
                rows.append({"cell": index, "seconds": seconds, "contexts": keys, **_held(details, cell)})
            if chunks and not self.synchronous:
                self._settle(names, tokens)
        self._drain(names)
        return rows

    def _decoding(self, contexts: list[int], count: int) -> tuple[list[str], dict[str, int]]:
        """Requests that decode, each with about the context asked for in the middle of the steps to come."""
        lengths = [self._aligned(max(1, min(each - count // 2 - 1, self.window - count - _SPARE))) for each in contexts]
        for slot, length in enumerate(lengths):
            # Blocks of the cache up to the last whole one; the rest of the prompt is computed.
            self._warm(slot, (length - 1) // self.block * self.block)
        names = [self._add(self._base(slot, length), count + _SPARE) for slot, length in enumerate(lengths)]
        tokens = dict.fromkeys(names, 0)
        for _ in range(_SETUP_STEPS):
            if all(tokens.values()):
                break
            found, _details = self._step()
            tokens.update((name, found[name]) for name in names if name in found)
        return names, tokens

    def _aligned(self, length: int) -> int:
        """A length near to it of which the cache holds all but one token: what is not in whole blocks is computed."""
        if length <= self.block:
            return length
        nearest = round((length - 1) / self.block) * self.block + 1
        return nearest if nearest <= self.window - 2 * _SPARE else nearest - self.block

    def _settle(self, names: list[str], tokens: dict[str, int]) -> None:
        """A step without prompts, so that the next one with a prompt is counted from a steady state."""
        found, _ = self._step()
        tokens.update((name, found[name]) for name in names if name in found)


def _held(details: Any, cell: dict[str, Any]) -> dict[str, Any]:
    """Whether the step held what was asked for, by vLLM's own account."""
    if details is None:
        return {"as_asked": False}
    asked = (sum(length for length, _ in cell["chunks"]), len(cell["chunks"]), len(cell["contexts"]))
    held = (details.num_ctx_tokens, details.num_ctx_requests, details.num_generation_tokens)
    return {"as_asked": held == asked, "held": list(held)}


def serve(driver: Driver, commands: IO[str], out: IO[str]) -> None:
    """Obey commands until the input ends: ``{"cells": [...], "order": [indices], "limit_s": S, "phase": NAME}``."""

    def say(line: dict[str, Any]) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    say({"ready": driver.facts})
    for line in commands:
        command = json.loads(line)
        driver.cells = command["cells"]
        deadline = time.monotonic() + command["limit_s"]
        for index in command["order"]:
            if time.monotonic() > deadline:
                break
            for row in driver.run(index):
                say({"phase": command["phase"], "at": time.monotonic(), **row})
        say({"done": command["phase"]})


def main(job_file: str, out_file: str) -> int:
    """Build the engine of a job, then serve. The parent reads `out_file` and the exit status."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    if job.get("cores"):
        os.sched_setaffinity(0, job["cores"])
    if job["device"] == "cpu":
        import torch

        torch.set_num_threads(job["threads"])
    driver = Driver(job)
    # As vLLM's engine process does once it is up.
    gc.collect()
    gc.freeze()
    with Path(out_file).open("w", encoding="utf-8") as out, contextlib.suppress(KeyboardInterrupt):
        serve(driver, sys.stdin, out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:3]))
