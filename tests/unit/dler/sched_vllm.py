"""vLLM's real scheduler on a clock of the test's, stock or ours, with a worker that has no model."""

from __future__ import annotations

import functools
import json
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

EOS, FILLER, BLOCK = 2, 5, 16
SEQS = 4


@functools.cache
def _config(ahead: bool, suite: str, policy: str, caching: bool) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import init_none_hash

    folder = Path(tempfile.mkdtemp(prefix="sched-model-"))
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, "vocab_size": 1024}
    more = {"max_position_embeddings": 2048, "eos_token_id": EOS, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(shape | model | more))
    init_none_hash(sha256)
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        load_format="dummy",
        block_size=BLOCK,
        max_model_len=1024,
        max_num_seqs=SEQS,
        max_num_batched_tokens=64,
        enable_chunked_prefill=True,
        enable_prefix_caching=caching,
        scheduling_policy=policy,  # type: ignore[arg-type]
        additional_config={"suite": {"dler": json.loads(suite)}},
    ).create_engine_config()


class Engine:
    """One scheduler and what happens to its requests, step by step.

    ``log`` has, for each step, who was scheduled for how many tokens, and who ended.
    """

    def __init__(
        self,
        suite: dict[str, Any] | None,
        *,
        blocks: int = 40,
        ahead: bool = False,
        policy: str = "fcfs",
        caching: bool = False,
        plugins: tuple[str, ...] = ("dler",),
    ) -> None:
        import torch
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        from vllm_suite.compat.scheduler import make_scheduler

        config = _config(ahead, json.dumps(suite or {}), policy, caching)
        # The CPU platform switches it off by itself; this scheduler has no worker to mind.
        config.scheduler_config.async_scheduling = ahead
        config.cache_config.num_gpu_blocks = blocks
        self.now = 1000.0
        self._hasher = get_request_block_hasher(BLOCK, sha256) if caching else None
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
        self.scheduler: Any = make_scheduler(
            vllm_config=config,
            plugins=() if suite is None else plugins,
            **({} if suite is None else {"clock": lambda: self.now}),
            kv_cache_config=KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            log_stats=False,
        )
        self.log: list[Any] = []
        self.ends: dict[str, Any] = {}
        self.tokens: dict[str, int] = {}
        self._lengths: dict[str, int] = {}
        self._flying: deque[tuple[Any, list[str], list[bool]]] = deque()
        self._depth = 2 if ahead else 1

    def add(
        self, name: str, prompt: int, length: int, label: str | None = None, priority: int = 0, **xargs: Any
    ) -> None:
        """A request that will end by itself after ``length`` tokens; its prompt is like no other's."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        extra = xargs | ({"dler_class": label} if label else {})
        params = SamplingParams(max_tokens=400, extra_args=extra or None)
        params.update_from_generation_config({}, eos_token_id=EOS)
        tokens = [10 + hash((name, n)) % 1000 for n in range(prompt)]
        self._lengths[name], self.tokens[name] = length, 0
        self.scheduler.add_request(
            Request(
                request_id=name,
                prompt_token_ids=tokens,
                sampling_params=params,
                pooling_params=None,
                arrival_time=self.now,
                priority=priority,
                block_hasher=self._hasher,
            )
        )

    def abort(self, name: str) -> None:
        from vllm.v1.request import RequestStatus

        if name in self.scheduler.requests:
            self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            self.ends[name] = "abort"

    def reset(self) -> None:
        """Send all running requests back to the queue."""
        if not self._flying:  # as the engine, which drains its pipeline first
            self.scheduler.reset_prefix_cache(reset_running_requests=True)

    def step(self, seconds: float = 0.02) -> None:
        """One turn of the engine: schedule, and take the result of the oldest step under way."""
        self.now += seconds
        orders = self.scheduler.schedule()
        self.log.append(dict(orders.num_scheduled_tokens))
        if orders.total_num_scheduled_tokens:
            requests = self.scheduler.requests
            names = list(orders.num_scheduled_tokens)
            self._flying.append((orders, names, [not requests[name].is_prefill_chunk for name in names]))
            if len(self._flying) < self._depth:
                return
        if self._flying:
            self._take(*self._flying.popleft())

    def drain(self, limit: int = 5000) -> None:
        """Step until nothing is left."""
        while self.scheduler.has_unfinished_requests() or self._flying:
            self.step()
            limit -= 1
            assert limit, "requests are left that never end"

    def _take(self, orders: Any, names: list[str], samples: list[bool]) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        sampled = []
        for name, sample in zip(names, samples, strict=True):
            if sample:
                self.tokens[name] += 1
            sampled.append([EOS if self.tokens[name] >= self._lengths[name] else FILLER] if sample else [])
        report = ModelRunnerOutput(names, {name: at for at, name in enumerate(names)}, sampled)
        for answers in self.scheduler.update_from_output(orders, report).values():
            for answer in answers.outputs:
                if answer.finish_reason is not None:
                    assert answer.request_id not in self.ends, answer
                    self.ends[answer.request_id] = str(answer.finish_reason)
                    self.log.append(answer.request_id)
