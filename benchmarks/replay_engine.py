"""vLLM's own scheduler on a virtual clock: real requests, real KV cache manager, and a worker without a model.

The worker stands where the model runner does. It knows each request's recorded length, gives one token whenever the
scheduler's orders complete a context, and an EOS as the last of them. The scheduler learns a length as it does in
production: from the EOS. All requests have the same `max_tokens`.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replay_steps import StepTimes
from replay_traces import Row
from replay_workload import Room

from vllm_suite.planner.sources.steps import Steps, pairs

EOS = 2
FIRST_FILLER = 3
MAX_TOKENS = 65536
MAX_MODEL_LEN = 1 << 19
PREFIX_BLOCK = 512
# Of vLLM's default on a large GPU.
BATCHED_TOKENS = 8192
CLASS_ARGUMENT = "dler_class"


class WorkerError(AssertionError):
    """The scheduler ordered what no model runner could do."""


@dataclass(frozen=True)
class EngineSettings:
    """How the scheduler is configured.

    Attributes:
        scheduler_cls: as for ``--scheduler-cls``; None is vLLM's own.
        policy: vLLM's ``--scheduling-policy``.
        additional: ``--additional-config``.
    """

    room: Room
    batched_tokens: int = BATCHED_TOKENS
    ahead: bool = False
    prefix_caching: bool = False
    policy: str = "fcfs"
    scheduler_cls: str | None = None
    additional: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """What one run did. Times are of the virtual clock except `overhead_s`, CPU seconds of this process.

    Attributes:
        latency, first_token: seconds from arrival to the last and first token, by request.
        recomputed: tokens computed again after a preemption.
        busy: share of the run in which a step was under way.
    """

    latency: list[float]
    first_token: list[float]
    outputs: list[int]
    preemptions: int = 0
    recomputed: int = 0
    steps: int = 0
    overhead_s: float = 0.0
    makespan: float = 0.0
    busy: float = 0.0


@functools.cache
def _model() -> Path:
    """A folder with a configuration that vLLM takes for a model; there are no weights."""
    folder = Path(tempfile.mkdtemp(prefix="replay-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": 1 << 20,
        "max_position_embeddings": MAX_MODEL_LEN,
        "eos_token_id": EOS,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_scheduler(settings: EngineSettings, clock: Callable[[], float] | None = None) -> Any:
    """The scheduler as an engine core would build it for these settings, for a KV cache of `settings.room`.

    Args:
        clock: for a scheduler of the suite, which reads the time; vLLM's own does not.
    """
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    room = settings.room
    config = EngineArgs(
        model=str(_model()),
        skip_tokenizer_init=True,
        dtype="float32",
        load_format="dummy",
        block_size=room.block_size,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=room.seqs,
        max_num_batched_tokens=settings.batched_tokens,
        enable_chunked_prefill=True,
        enable_prefix_caching=settings.prefix_caching,
        async_scheduling=settings.ahead,
        scheduling_policy=settings.policy,  # type: ignore[arg-type]
        scheduler_cls=settings.scheduler_cls,
        additional_config=settings.additional,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = room.blocks
    # vLLM's CPU platform turns it off. Its other scheduler, driven a step ahead, gives a request every second step.
    config.scheduler_config.async_scheduling = settings.ahead
    init_none_hash(sha256)
    spec = FullAttentionSpec(block_size=room.block_size, num_kv_heads=1, head_size=32, dtype=torch.float32)
    return config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(room.blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=room.block_size,
        log_stats=False,
        **({"clock": clock} if settings.scheduler_cls and clock else {}),
    )


def prompt_tokens(row: Row, index: int) -> list[int]:
    """Token ids of a prompt: equal blocks of 512 for equal prefix ids, and else of this request alone.

    Args:
        index: the request's place in the run; what is not shared is named after it.
    """
    own = FIRST_FILLER + 2 * index
    if not row.prefix:
        return [own] * row.prompt
    tokens: list[int] = []
    for block in row.prefix:
        tokens += [FIRST_FILLER + 1 + 2 * block] * PREFIX_BLOCK
    tokens = tokens[: row.prompt]
    return tokens + [own] * (row.prompt - len(tokens))


def make_request(row: Row, index: int, hasher: Any = None, priority: int = 0) -> Any:
    """The request that the scheduler sees. Nothing in it depends on `row.output`."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    extra = {CLASS_ARGUMENT: row.label} if row.label else None
    params = SamplingParams(max_tokens=MAX_TOKENS, extra_args=extra)
    params.update_from_generation_config({}, eos_token_id=EOS)
    return Request(
        request_id=f"r{index}",
        prompt_token_ids=prompt_tokens(row, index),
        sampling_params=params,
        pooling_params=None,
        arrival_time=row.arrival_s,
        priority=priority,
        block_hasher=hasher,
    )


class Worker:
    """The model runner's books. The only holder of the recorded lengths.

    Args:
        rows: by index of the request.
    """

    def __init__(self, rows: Sequence[Row], settings: EngineSettings) -> None:
        self._lengths = [row.output for row in rows]
        self._settings = settings
        self._sampled = [0] * len(rows)
        self._reached = [0] * len(rows)
        self.recomputed = 0

    def begin(self, scheduler: Any, orders: Any) -> tuple[Steps, list[str], list[bool]]:
        """Take one step's orders, right after `schedule()` gave them.

        Returns: what it computes, the requests in it, and for each whether the step gives it a token.
        Raises WorkerError for orders that break the configuration.
        """
        requests = scheduler.requests
        reached = self._reached
        chunks = prefill = before = decoding = context = total = 0
        attended = 0.0
        samples: list[bool] = []
        for name, count in orders.num_scheduled_tokens.items():
            request = requests[name]
            index = int(name[1:])
            end = request.num_computed_tokens
            known = reached[index]
            if end - count > known and not self._settings.prefix_caching:
                raise WorkerError(f"{name}: tokens {known} to {end - count} are skipped")
            if end > known:
                reached[index] = end
                self.recomputed += max(0, known - end + count)  # below 0: the prefix cache had some
            else:
                self.recomputed += count
            if count > 1 or end <= request.num_prompt_tokens:
                chunks, prefill, before = chunks + 1, prefill + count, before + end - count
                attended += pairs(count, end - count)
            else:
                decoding, context = decoding + 1, context + end
            total += count
            samples.append(not request.is_prefill_chunk)
        if total > self._settings.batched_tokens or len(samples) > self._settings.room.seqs:
            raise WorkerError(f"{total} tokens of {len(samples)} sequences in one step")
        steps = Steps(prefill, chunks, before, attended, decoding, context)
        return steps, list(orders.num_scheduled_tokens), samples

    def finish(self, names: list[str], samples: list[bool]) -> Any:
        """The step's result as the scheduler takes it."""
        from vllm.v1.outputs import ModelRunnerOutput

        sampled, lengths = self._sampled, self._lengths
        tokens: list[list[int]] = []
        for name, sample in zip(names, samples, strict=True):
            if not sample:
                tokens.append([])
                continue
            index = int(name[1:])
            sampled[index] += 1
            tokens.append([EOS if sampled[index] >= lengths[index] else FIRST_FILLER + 2 * index])
        return ModelRunnerOutput(names, {name: at for at, name in enumerate(names)}, tokens)


@dataclass
class Client:
    """What a client in front of the engine does: sets a request's priority, and sees it finish.

    Attributes:
        priority: of a request on arrival; None leaves all at 0.
        finished: called with each finished request.
    """

    priority: Callable[[Row], int] | None = None
    finished: Callable[[Row], None] | None = None


def replay(rows: Sequence[Row], settings: EngineSettings, latency: StepTimes, client: Client | None = None) -> Outcome:
    """Serve `rows` to the last one. Arrival times count from 0 on the virtual clock.

    With `settings.ahead` a step is scheduled while the one before it computes, as vLLM's asynchronous scheduling does.
    Raises ValueError for a request that can never fit, WorkerError for orders that no worker could follow.
    """
    client = client or Client()
    capacity = settings.room.blocks * settings.room.block_size
    for index, row in enumerate(rows):
        if row.prompt + row.output > capacity or row.output > MAX_TOKENS:
            raise ValueError(f"request {index}: {row.prompt} + {row.output} tokens; the KV cache holds {capacity}")
    now = busy = 0.0
    scheduler = make_scheduler(settings, lambda: now)
    hasher = _hasher(settings)
    worker = Worker(rows, settings)
    count = len(rows)
    result = Outcome([0.0] * count, [0.0] * count, [0] * count)
    arrived = done = idle = 0
    live: dict[int, Any] = {}
    flying: deque[tuple[Any, Steps, list[str], list[bool]]] = deque()
    cpu = time.thread_time
    while done < count:
        while arrived < count and (rows[arrived].arrival_s or 0.0) <= now:
            row = rows[arrived]
            request = make_request(row, arrived, hasher, client.priority(row) if client.priority else 0)
            scheduler.add_request(request)
            live[arrived] = request
            arrived += 1
        begin = cpu()
        orders = scheduler.schedule()
        result.overhead_s += cpu() - begin
        idle = 0 if orders.total_num_scheduled_tokens else idle + 1
        if orders.total_num_scheduled_tokens:
            flying.append((orders, *worker.begin(scheduler, orders)))
        if len(flying) < (2 if settings.ahead else 1) and orders.total_num_scheduled_tokens:
            continue
        if not flying:
            if arrived == count and idle > 3:
                raise WorkerError(f"nothing is scheduled, and {count - done} requests wait")
            if arrived < count:
                now = max(now, rows[arrived].arrival_s or 0.0)
            continue
        orders, steps, names, samples = flying.popleft()
        seconds = latency.step_seconds(steps)
        now += seconds
        busy += seconds
        report = worker.finish(names, samples)
        begin = cpu()
        answers = scheduler.update_from_output(orders, report)
        result.overhead_s += cpu() - begin
        result.steps += 1
        for answer in answers[0].outputs if 0 in answers else ():
            index = int(answer.request_id[1:])
            if not result.outputs[index]:
                result.first_token[index] = now - (rows[index].arrival_s or 0.0)
            result.outputs[index] += len(answer.new_token_ids)
            if answer.finish_reason is not None:
                result.latency[index] = now - (rows[index].arrival_s or 0.0)
                result.preemptions += live.pop(index).num_preemptions
                done += 1
                if client.finished:
                    client.finished(rows[index])
    result.recomputed, result.makespan, result.busy = worker.recomputed, now, busy / now
    return result


def _hasher(settings: EngineSettings) -> Any:
    if not settings.prefix_caching:
        return None
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher

    return get_request_block_hasher(settings.room.block_size, sha256)
