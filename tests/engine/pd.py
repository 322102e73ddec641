"""Two real engines, one prefilling and one decoding, in one process tree.

Each child, see :mod:`child`, builds an engine with ``SuiteNixlConnector``. NIXL moves the KV between the two processes
as it does between two servers.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from child import CALL_TIMEOUT_S, TINY, Child, environment, free_port, serve, side_by_side

PREFILL_PARAMS = {"do_remote_decode": True, "do_remote_prefill": False}


def prompt(tokens: int, seed: int) -> list[int]:
    """A reproducible random prompt of the tiny model's ordinary tokens."""
    rng = random.Random(seed)
    return [rng.randrange(16, 500) for _ in range(tokens)]


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


class Engine(Child):
    """Parent's handle of a child engine."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.side_port = int(spec.env.get("VLLM_NIXL_SIDE_CHANNEL_PORT") or free_port())
        super().__init__(_child, spec, self.side_port)

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


@contextlib.contextmanager
def engines(*specs: Spec) -> Iterator[list[Engine]]:
    """Start engines side by side and end them afterwards, whatever happened."""
    with side_by_side(Engine, specs) as started:
        yield started


# --- in the child ---


def _child(pipe: Connection, spec: Spec, side_port: int) -> None:
    environment(spec.name, {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port)}, spec.env)
    serve(pipe, lambda: _make_llm(spec), {"generate": _generate, "generate_many": _generate_many})


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
        **TINY,
        "num_gpu_blocks_override": spec.blocks,
        "enable_prefix_caching": spec.prefix_caching,
        "kv_transfer_config": transfer,
    }
    return LLM(str(spec.model), **{**options, **spec.llm})


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
