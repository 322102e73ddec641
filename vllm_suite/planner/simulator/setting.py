"""All that a simulation needs beside the plan: model, hardware, where times come from, and the engines' settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from vllm_suite.planner.hardware import Cluster
from vllm_suite.planner.models import Model, ModelError, Quantization, prefill_only
from vllm_suite.planner.models.memory import activation_bytes, kv_capacity
from vllm_suite.planner.plan import Plan, PlanError, PoolPlan
from vllm_suite.planner.simulator.engine import Limits
from vllm_suite.planner.simulator.jobs import WaitingQueue
from vllm_suite.planner.sources.base import LatencySource
from vllm_suite.planner.workload import Item, Request


@dataclass(frozen=True)
class Serving:
    """What router and connectors do between instances. The defaults are the suite's own.

    Attributes:
        min_prompt_tokens: shorter prompts go straight to decode (``disaggregation.min_prompt_tokens``).
        max_cached_fraction, history_tokens: a prompt of which the decode instance has answered more than this share
            before goes straight to it, and so does one with fewer other tokens than `min_prompt_tokens`; tokens of
            prompts that the router remembers of an instance.
        hop_s: seconds from the answer of one stage until the next stage has the request; 0 where nobody measured it.
        pull_s: seconds that the pull of a request's keys and values takes beside what `Transfers` says.
        streams: whose token the client sees first. The suite's router throws prefill's away and streams decode's;
            DistServe and EPD stream prefill's.
        max_hold_s: how long a prefill instance keeps blocks for a decode instance that has claimed them.
        overlap: whether prefill runs ahead of the items (``encode.overlap``): for requests with several of them to wait
            for (`auto`), or with any (`always`). Prefill then holds the encoder too, as the router asks of it.
        encode_policy, load_factor: which encoder gets an item (``encode.policy``).
        slice_min_tokens, slice_tokens, max_slices, min_encoders: how an item is cut (``encode.slices``); it is not cut
            into more than its `Item.pieces`.
        encode_pool_bytes: of an encoder's token cache.
        request_s, prompt_token_s, busy_s: seconds to the first token that no stage has in it: of every request, of each
            token of its prompt, and of a request that is not alone in the fleet when it comes or gets its first token;
            0 where nobody measured them.
        answer_tokens: that the router charges for an answer, `max_tokens` of the client; None for its true length.
    """

    min_prompt_tokens: int = 256
    max_cached_fraction: float = 0.75
    history_tokens: int = 65_536 * 128
    hop_s: float = 0.0
    pull_s: float = 0.0
    streams: Literal["decode", "prefill"] = "decode"
    max_hold_s: float = 600.0
    overlap: Literal["auto", "always", "never"] = "auto"
    encode_policy: Literal["cache_affinity", "least_encode_tokens"] = "cache_affinity"
    load_factor: float = 1.1
    slice_min_tokens: int = 1024
    slice_tokens: int = 512
    max_slices: int = 8
    min_encoders: int = 2
    encode_pool_bytes: float = 2.0**28
    request_s: float = 0.0
    prompt_token_s: float = 0.0
    busy_s: float = 0.0
    answer_tokens: int | None = None


_SERVING = Serving()

RUNTIME_BYTES = 2.0**30
"""A GPU's, where nobody measured it: the reserve of APEX's simulator (arXiv 2411.17651). Logs of vLLM that users
published have 0.33 GiB outside PyTorch (vllm-project/vllm issue 14452), 0.36 GiB of graphs (gpustack/runner pull
request 251), and on B300 GPUs 1.63 and 0.14 GiB.
"""


class Measured(Protocol):
    """What was measured of a served engine beside its steps; it depends on the plan and on how busy its engines are."""

    @property
    def notes(self) -> tuple[str, ...]:
        """For reports."""
        ...

    def settled(self, plan: Plan, setting: Setting, requests: Callable[[], Iterable[Request]]) -> Setting:
        """The setting with it, for this plan on these requests."""
        ...


@dataclass(frozen=True)
class Setting:
    """What stays the same while plans are compared.

    Attributes:
        model, quant, cluster: what is served and on what. A pool's own `quant` takes precedence.
        source: step times of a pool's engines. Called once for each pool and simulation; cache it where building a
            source takes time.
        encode_seconds: seconds of one item on one encoder of a pool, alone; None where no request has items.
        prefix_caching, async_scheduling: vLLM's settings of every engine.
        second_runner: vLLM's second model runner, its default where Triton is installed. With the first one vLLM does
            not schedule ahead where an engine has pipeline stages (vllm/config/vllm.py, 0.32).
        by_length: requests end at a length that the engine was told, as in a benchmark; see `Limits`.
        block_size: tokens of a block of cache.
        queue: makes each engine's waiting queue; None for first come, first served.
        serving: what router and connectors do between instances.
        utilisation: share of an accelerator's memory that an engine may take (``--gpu-memory-utilization``).
        runtime_bytes: of that, on each accelerator, what vLLM takes beside weights, activations and cache: CUDA graphs,
            which it counts since 0.21, communicators, workspaces. None for `RUNTIME_BYTES` on a GPU, and 0 on a CPU.
        measured: of served engines, see `settled`; `simulate_plan` itself takes a setting as it is.
    """

    model: Model
    quant: Quantization
    cluster: Cluster
    source: Callable[[PoolPlan], LatencySource]
    encode_seconds: Callable[[PoolPlan, Item], float] | None = None
    prefix_caching: bool = True
    async_scheduling: bool = True
    second_runner: bool = True
    by_length: bool = False
    block_size: int = 16
    queue: Callable[[], WaitingQueue] | None = None
    serving: Serving = _SERVING
    utilisation: float = 0.9
    runtime_bytes: float | None = None
    measured: Measured | None = None

    @property
    def overhead(self) -> float:
        """`runtime_bytes`, or its default."""
        if self.runtime_bytes is not None:
            return self.runtime_bytes
        return RUNTIME_BYTES if self.cluster.device.kind == "gpu" else 0.0

    def settled(self, plan: Plan, requests: Callable[[], Iterable[Request]]) -> Setting:
        """With all that was measured of served engines, for this plan on these requests; itself where nothing was.

        Args:
            requests: called for each simulation that finds out how busy the engines are.

        Raises:
            SimulationError, PlanError: the plan cannot serve the requests.
        """
        return self if self.measured is None else self.measured.settled(plan, self, requests)

    def held(self, pool: PoolPlan, *, encoder: bool = True) -> Model:
        """The model as an engine of the pool holds it: with or without encoder, without SwiftKV's late layers."""
        model = prefill_only(self.model) if pool.late_kv_only else self.model
        return model if encoder else replace(model, encoder=None)

    def ahead(self, pool: PoolPlan) -> bool:
        """Whether a pool's engines schedule ahead."""
        return self.async_scheduling and (pool.parallel.pp == 1 or self.second_runner)

    def encodes(self, plan: Plan, pool: PoolPlan) -> bool:
        """Whether a pool's engines hold the model's encoder: without an encode pool all do, beside one those whose
        prefill runs ahead of it, as they get the media.
        """
        return plan.pool("encode") is None or self.overlaps(pool)

    def overlaps(self, pool: PoolPlan) -> bool:
        """Whether a pool beside encoders runs ahead of them. With pipeline stages none does: the suite's connector
        does not work there.
        """
        return pool.role == "prefill" and pool.parallel.pp == 1 and self.serving.overlap != "never"

    def limits(self, pool: PoolPlan, *, encoder: bool = True) -> Limits:
        """An engine's limits; blocks of cache from its memory where the pool does not name them.

        Args:
            encoder: whether its engines hold the model's encoder, if there is one.

        Raises:
            PlanError: the weights leave no room for a block.
        """
        blocks = pool.kv_blocks
        if blocks is None:
            quant, model = pool.quant or self.quant, self.held(pool, encoder=encoder)
            step = activation_bytes(model, quant, pool.parallel, pool.max_num_batched_tokens, pool.max_num_seqs)
            try:
                found = kv_capacity(
                    model,
                    quant,
                    pool.parallel,
                    self.cluster.device.memory_bytes,
                    utilisation=self.utilisation,
                    activations=step,
                    overhead=self.overhead,
                    block=self.block_size,
                )
            except ModelError as error:
                raise PlanError(f"pool {pool.name}: {error}") from error
            blocks = found.tokens // self.block_size
            if blocks < 1:
                raise PlanError(f"pool {pool.name}: {found.free_bytes / 2**20:.0f} MiB are left for cache, no block")
        return Limits(
            blocks=blocks,
            block_size=self.block_size,
            max_num_seqs=pool.max_num_seqs,
            max_num_batched_tokens=pool.max_num_batched_tokens,
            async_scheduling=self.ahead(pool),
            by_length=self.by_length,
            prefix_caching=self.prefix_caching,
        )
