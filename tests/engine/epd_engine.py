"""Real multimodal engines, each in a process of its own: E, P, D, PD, `any` and monolithic ones.

Encoder outputs move between the processes, see :mod:`child`, as between servers. A probe around the model's own
``embed_multimodal`` counts what the encoder really computed.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from child import CALL_TIMEOUT_S, TINY, Child, environment, free_port, serve, side_by_side
from pd import PREFILL_PARAMS

from vllm_suite.fleet.pictures_parts import Part, user_message

Role = Literal["mono", "e", "p", "d", "pd", "any"]
EC_ROLES = {"e": "ec_producer", "p": "ec_consumer", "d": "ec_consumer", "pd": "ec_consumer", "any": "ec_both"}
KV_ROLES = {"p": "kv_producer", "d": "kv_consumer", "any": "kv_both"}
SUITE = ("SuiteECConnector", "vllm_epd.connector")
MANAGER = "vllm_epd.manager.SuiteEncoderCacheManager"
SCHEDULER = "vllm_suite.compat.encode_only.EncodeOnlyScheduler"

# What a part becomes when its item is already encoded. Qwen2.5-VL's films are left out: the time between frames,
# which the positions depend on, is no part of the metadata.
METADATA_PARTS = {
    "qwen2_5_vl": {"image": "image_embeds"},
    "qwen3_vl": {"image": "image_embeds", "video": "video_embeds"},
    "qwen2_audio": {"audio": "audio_embeds"},
}
_KINDS = {"image_url": "image", "video_url": "video", "input_audio": "audio", "audio_url": "audio"}

_MODULES = (
    "PIL.Image",
    "cv2",
    "soundfile",
    "torchvision",
    "transformers",
    "vllm.model_executor.models.interns1",
    "vllm.model_executor.models.llava_onevision",
    "vllm.model_executor.models.qwen2_5_vl",
    "vllm.model_executor.models.qwen2_audio",
    "vllm.model_executor.models.qwen3_vl",
)


@dataclass
class Ask:
    """One chat request; ``ec`` and ``kv`` are its transfer parameters."""

    parts: list[Part]
    ec: dict[str, Any] | None = None
    kv: dict[str, Any] | None = None
    max_tokens: int = 8
    mm_processor_kwargs: dict[str, Any] | None = None


@dataclass
class Answer:
    """One finished request, as the engine reported it; ``logprobs`` are those of the tokens, to 4 decimals."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str | None
    ec: dict[str, Any] | None
    kv: dict[str, Any] | None
    prompt_tokens: int
    cached_tokens: int

    def said(self) -> tuple[list[int], list[float]]:
        """What two engines that compute the same must agree on."""
        return self.tokens, self.logprobs


@dataclass
class Counts:
    """What the encoder of one engine computed since it started: runs of the model, items and rows."""

    runs: int = 0
    items: int = 0
    rows: int = 0


@dataclass
class Spec:
    """One child engine; ``suite`` are the EC connector's settings, ``llm`` vLLM's own arguments."""

    name: str
    model: Path
    role: Role
    suite: dict[str, Any] = field(default_factory=dict)
    connector: tuple[str, str | None] = SUITE
    ec_extra: dict[str, Any] = field(default_factory=dict)
    prefix_caching: bool = False
    blocks: int = 160
    env: dict[str, str] = field(default_factory=dict)
    llm: dict[str, Any] = field(default_factory=dict)


class EpdEngine(Child):
    """Parent's handle of a child engine."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.side_port, self.ec_port = free_port(), int(spec.env.get("VLLM_EC_SIDE_CHANNEL_PORT") or free_port())
        super().__init__(_child, spec, self.side_port, self.ec_port)

    def ask_many(self, asks: Sequence[Ask], timeout_s: float = CALL_TIMEOUT_S) -> list[Answer]:
        """Send requests together and wait for all of them."""
        self.send("ask", list(asks))
        answers: list[Answer] = self.receive(timeout_s)
        return answers

    def ask(self, parts: Sequence[Part], timeout_s: float = CALL_TIMEOUT_S, **options: Any) -> Answer:
        return self.ask_many([Ask(list(parts), **options)], timeout_s)[0]

    def encode(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Have the media among ``parts`` encoded; returns what to give to the consumers."""
        answer = self.ask(media(parts), ec={"suite_encode_only": True}, max_tokens=1)
        assert answer.finish_reason == "stop", answer
        assert answer.ec is not None
        return answer.ec

    def prefill(self, parts: Sequence[Part], ec: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        """Compute the KV for a decode instance; returns its kv_transfer_params."""
        answer = self.ask(parts, ec=ec, kv=dict(PREFILL_PARAMS), max_tokens=1, **options)
        assert answer.kv is not None, answer
        return answer.kv

    def counts(self) -> Counts:
        counts: Counts = self.call(_counts)
        return counts

    @contextlib.contextmanager
    def encodes(self, items: int) -> Iterator[None]:
        """The encoder of this engine computes so many items within the block, no more and no fewer."""
        before = self.counts().items
        yield
        assert self.counts().items - before == items


@contextlib.contextmanager
def engines(*specs: Spec) -> Iterator[list[EpdEngine]]:
    """Start engines side by side and end them afterwards, whatever happened."""
    with side_by_side(EpdEngine, specs, *_MODULES) as started:
        yield started


def kind_of(part: Part) -> str | None:
    """The modality of a media part; None for text."""
    return next((kind for key, kind in _KINDS.items() if key in part), None)


def media(parts: Sequence[Part]) -> list[Part]:
    return [part for part in parts if kind_of(part)]


def references(ec: dict[str, Any]) -> dict[str, Any]:
    """What a consumer is told of an encoder's answer."""
    return {identifier: {"suite": item["suite"]} for identifier, item in ec.items() if "suite" in item}


def without_media(family: str, parts: Sequence[Part], ec: dict[str, Any]) -> list[Part]:
    """``parts`` with the items of ``ec`` named instead of sent, where the family takes that.

    vLLM refuses a request that sends one item of a modality and names another: a modality is named whole or not at
    all.
    """
    kinds = METADATA_PARTS.get(family, {})
    sent = {kind_of(part) for part in parts if kind_of(part) and not ec.get(part.get("uuid", ""), {}).get("metadata")}
    named = []
    for part in parts:
        kind = kind_of(part)
        if kind in kinds and kind not in sent:
            key, identifier = kinds[kind], part["uuid"]
            part = {"type": key, key: ec[identifier]["metadata"], "uuid": identifier}
        named.append(part)
    return named


# --- in the child ---


def _child(pipe: Connection, spec: Spec, side_port: int, ec_port: int) -> None:
    ports = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port), "VLLM_EC_SIDE_CHANNEL_PORT": str(ec_port)}
    environment(spec.name, ports, {"VLLM_EC_SIDE_CHANNEL_HOST": "127.0.0.1"}, spec.env)
    # The sampler compiles a small function the first time that somebody wants logprobs: two seconds for each engine.
    importlib.import_module("torch._dynamo").config.disable = True

    def make() -> Any:
        llm = _make_llm(spec)
        _probe(llm)
        return llm

    serve(pipe, make, {"ask": _ask})


def _make_llm(spec: Spec) -> Any:
    from vllm import LLM

    options: dict[str, Any] = {
        **TINY,
        "num_gpu_blocks_override": spec.blocks,
        "enable_prefix_caching": spec.prefix_caching,
    }
    if spec.role in EC_ROLES:
        name, module = spec.connector
        extra = {**spec.ec_extra, **({"suite": spec.suite} if spec.connector == SUITE else {})}
        transfer = {"ec_connector": name, "ec_role": EC_ROLES[spec.role], "ec_connector_extra_config": extra}
        options["ec_transfer_config"] = {**transfer, **({"ec_connector_module_path": module} if module else {})}
        if spec.connector == SUITE:
            options["ec_manager_config"] = {"encoder_cache_manager_cls": MANAGER}
        if spec.connector == SUITE and spec.role == "any":
            options["scheduler_cls"] = SCHEDULER
    if spec.role in KV_ROLES:
        options["kv_transfer_config"] = {
            "kv_connector": "SuiteNixlConnector",
            "kv_connector_module_path": "vllm_disagg.connector",
            "kv_role": KV_ROLES[spec.role],
            "kv_buffer_device": "cpu",
            "kv_load_failure_policy": "fail",
            "kv_connector_extra_config": {"suite": {}},
        }
    return LLM(str(spec.model), **{**options, **spec.llm})


def _ask(llm: Any, asks: list[Ask]) -> list[Answer]:
    from vllm import SamplingParams

    (kwargs,) = {str(ask.mm_processor_kwargs) for ask in asks}  # one for the whole batch, as LLM.chat has it
    assert kwargs
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=ask.max_tokens,
            ignore_eos=True,
            logprobs=0,
            extra_args={"ec_transfer_params": ask.ec, "kv_transfer_params": ask.kv},
        )
        for ask in asks
    ]
    outputs = llm.chat(
        [user_message(ask.parts) for ask in asks],
        params,
        use_tqdm=False,
        mm_processor_kwargs=asks[0].mm_processor_kwargs,
    )
    return [_answer(output) for output in outputs]


def _answer(output: Any) -> Answer:
    (one,) = output.outputs
    tokens = list(one.token_ids)
    return Answer(
        tokens=tokens,
        logprobs=[round(step[token].logprob, 4) for step, token in zip(one.logprobs or [], tokens, strict=True)],
        finish_reason=one.finish_reason,
        ec=output.ec_transfer_params,
        kv=output.kv_transfer_params,
        prompt_tokens=len(output.prompt_token_ids),
        cached_tokens=output.num_cached_tokens or 0,
    )


_COUNTS = Counts()


def runner(llm: Any) -> Any:
    """The model runner of an in-process engine."""
    worker = llm.llm_engine.model_executor.driver_worker
    return getattr(worker, "worker", worker).model_runner


def _probe(llm: Any) -> None:
    """Count what the model's own ``embed_multimodal`` returns; an engine without an encoder has nothing to count."""
    model = runner(llm).model
    compute = model.embed_multimodal

    def counted(**kwargs: Any) -> Any:
        outputs = compute(**kwargs)
        _COUNTS.runs += 1
        _COUNTS.items += len(outputs)
        _COUNTS.rows += sum(len(rows) for rows in outputs)
        return outputs

    model.embed_multimodal = counted


def _counts(_llm: Any) -> Counts:
    return _COUNTS


def until(condition: Any, timeout_s: float = 20.0) -> None:
    """Wait until ``condition()`` is true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
