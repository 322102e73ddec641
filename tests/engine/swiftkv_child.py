"""What a child of `swiftkv_engine` does: an in-process engine, driven step by step and watched from outside."""

from __future__ import annotations

import contextlib
import importlib
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from child import ENGINE_ENV

BLOCK = 32  # tokens per KV block, the smallest that attention on CPU takes
TOP = 5  # log-probabilities compared at each position
POISON = 1e4  # large enough that one slot that is read and was not written changes every token


@dataclass(frozen=True)
class Ask:
    """One request. ``at``: the step before which it arrives. ``lora``: folder of an adapter."""

    prompt: tuple[int, ...]
    max_tokens: int = 8
    at: int = 0
    lora: str | None = None
    prompt_logprobs: int | None = None


@dataclass
class Answer:
    """What the engine gave: tokens, the top log-probabilities of each, those of the prompt, cached prompt tokens."""

    tokens: list[int]
    logprobs: list[dict[int, float]]
    prompt_logprobs: list[dict[int, float] | None] | None
    cached: int


@dataclass
class Report:
    """One run: answers in the order of the requests, and what happened meanwhile.

    Attributes:
        steps: of each engine step, the tokens and the draft tokens scheduled per request.
        prompt_tokens: scheduled tokens that belong to requests still in their prompt.
        preemptions: requests thrown out of the batch, counted with repetition.
        accepted: draft tokens accepted.
        counted: growth of the plugin's counters.
        tail_rows: rows given to the tail at each step, padding included.
        skipped_rows: rows of the model's output that are NaN, over all steps.
        sampled_nan: whether a NaN row reached the LM head.
    """

    answers: list[Answer]
    steps: list[dict[str, tuple[int, int]]]
    prompt_tokens: int
    preemptions: int
    accepted: int
    counted: dict[str, int]
    tail_rows: list[int]
    skipped_rows: int
    sampled_nan: bool

    @property
    def scheduled(self) -> int:
        return sum(tokens for step in self.steps for tokens, _ in step.values())

    @property
    def sampled(self) -> int:
        """Rows that vLLM takes logits of: one per request and step, and one more per draft token."""
        return sum(1 + drafts for step in self.steps for _, drafts in step.values())


@dataclass(frozen=True)
class Spec:
    """One engine. ``llm`` replaces options of `vllm.LLM`; ``env`` is set before anything of the child runs."""

    model: Path
    armed: bool = True
    eager: bool = True
    budget: int = 128
    blocks: int = 256
    prepare: Callable[[], None] | None = None
    env: dict[str, str] = field(default_factory=dict)
    llm: dict[str, Any] = field(default_factory=dict)


def child(pipe: Connection, spec: Spec) -> None:
    os.environ.update(ENGINE_ENV)
    os.environ.update(spec.env)
    torch.set_num_threads(1)
    if spec.eager:  # vLLM compiles some small functions of its sampler whatever `enforce_eager` says
        importlib.import_module("torch._dynamo.config").disable = True
    try:
        if spec.prepare is not None:
            spec.prepare()
        llm = _make_llm(spec)
    except BaseException as error:  # noqa: BLE001  the parent reports it
        pipe.send(("error", (type(error).__name__, str(error), traceback.format_exc())))
        os._exit(1)
    pipe.send(("ok", None))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send(("ok", function(llm, *args)))
        except BaseException as error:  # noqa: BLE001  the parent reports it
            pipe.send(("error", (type(error).__name__, str(error), traceback.format_exc())))


def _make_llm(spec: Spec) -> Any:
    from vllm import LLM

    options: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": spec.eager,
        "kv_sharing_fast_prefill": spec.armed,
        "max_model_len": min(1024, (spec.blocks - 1) * BLOCK),  # one block is vLLM's own
        "max_num_batched_tokens": spec.budget,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 64 << 20,
        "num_gpu_blocks_override": spec.blocks,
        "block_size": BLOCK,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "logprobs_mode": "raw_logprobs",
    }
    return LLM(str(spec.model), **{**options, **spec.llm})


def core(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core


def runner(llm: Any) -> Any:
    return core(llm).model_executor.driver_worker.worker.model_runner


def poison(llm: Any, value: float = POISON) -> None:
    """Overwrite every slot of every KV cache, so that one that is read before it is written shows."""
    for cache in runner(llm).kv_caches:
        cache.fill_(value)


def drive(llm: Any, asks: list[Ask]) -> Report:
    """Run requests to their end, each arriving before its step."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from vllm_swiftkv.counters import COUNTERS

    waiting = sorted(range(len(asks)), key=lambda i: asks[i].at)
    adapters = {path: i for i, path in enumerate(sorted({a.lora for a in asks if a.lora}), 1)}
    finished: dict[str, Any] = {}
    before = COUNTERS.snapshot()
    with _watch(llm) as seen:
        step = 0
        while waiting or llm.llm_engine.has_unfinished_requests():
            while waiting and (asks[waiting[0]].at <= step or not llm.llm_engine.has_unfinished_requests()):
                i = waiting.pop(0)
                ask = asks[i]
                params = SamplingParams(
                    temperature=0.0,
                    max_tokens=ask.max_tokens,
                    ignore_eos=True,
                    detokenize=False,
                    logprobs=TOP,
                    prompt_logprobs=ask.prompt_logprobs,
                )
                lora = LoRARequest(ask.lora, adapters[ask.lora], ask.lora) if ask.lora else None
                prompt = {"prompt_token_ids": list(ask.prompt)}
                llm.llm_engine.add_request(str(i), prompt, params, lora_request=lora)
            for output in llm.llm_engine.step():
                if output.finished:
                    finished[output.request_id] = output
            step += 1
            assert step < 5000, "the engine makes no progress"
    after = COUNTERS.snapshot()
    counted = {key: after[key] - before[key] for key in ("steps", "head_tokens", "prompt_tokens", "tail_rows")}
    answers = [_answer(finished[str(i)]) for i in range(len(asks))]
    return Report(answers, counted=counted, **seen)


def _answer(output: Any) -> Answer:
    best = output.outputs[0]
    plain = [{t: lp.logprob for t, lp in row.items()} for row in best.logprobs]
    prompt = output.prompt_logprobs
    if prompt is not None:
        prompt = [None if row is None else {t: lp.logprob for t, lp in row.items()} for row in prompt]
    return Answer(list(best.token_ids), plain, prompt, output.num_cached_tokens or 0)


@contextlib.contextmanager
def _watch(llm: Any) -> Iterator[dict[str, Any]]:
    """Record what scheduler and model do, from outside both."""
    scheduler, model = core(llm).scheduler, runner(llm).model
    seen: dict[str, Any] = {
        **{"steps": [], "prompt_tokens": 0, "preemptions": 0, "accepted": 0},
        **{"tail_rows": [], "skipped_rows": 0, "sampled_nan": False},
    }
    schedule, update, logits, tail = (
        scheduler.schedule,
        scheduler.update_from_output,
        model.compute_logits,
        model.model.tail,
    )

    def watched_schedule(*args: Any, **kwargs: Any) -> Any:
        out = schedule(*args, **kwargs)
        seen["preemptions"] += len(out.preempted_req_ids or ())
        drafts = out.scheduled_spec_decode_tokens
        if out.num_scheduled_tokens:
            seen["steps"].append({r: (n, len(drafts.get(r, ()))) for r, n in out.num_scheduled_tokens.items()})
        for name, count in out.num_scheduled_tokens.items():
            request = scheduler.requests[name]
            # `schedule` has advanced the request already.
            if request.num_computed_tokens - count < request.num_prompt_tokens:
                seen["prompt_tokens"] += count
        return out

    def watched_update(out: Any, result: Any) -> Any:
        sampled = {r: len(result.sampled_token_ids[i]) for r, i in result.req_id_to_index.items()}
        seen["accepted"] += sum(max(0, sampled.get(r, 1) - 1) for r in out.scheduled_spec_decode_tokens)
        return update(out, result)

    def watched_logits(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen["sampled_nan"] |= bool(hidden.isnan().any())
        return logits(hidden, *args, **kwargs)

    class WatchedTail(torch.nn.Module):
        def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> Any:
            seen["tail_rows"].append(positions.shape[0])
            return tail(positions, hidden_states)

    def watched_output(module: Any, args: Any, out: torch.Tensor) -> None:
        seen["skipped_rows"] += int(out.isnan().all(-1).sum())

    scheduler.schedule, scheduler.update_from_output = watched_schedule, watched_update
    model.compute_logits, model.model.tail = watched_logits, WatchedTail()
    hook = model.register_forward_hook(watched_output)
    try:
        yield seen
    finally:
        hook.remove()
        del scheduler.schedule, scheduler.update_from_output, model.compute_logits
        model.model.tail = tail
