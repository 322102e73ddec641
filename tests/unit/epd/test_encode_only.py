"""Encode-only requests against every prompt: vLLM's own scheduler with a worker that only keeps books.

The worker's side is what a model runner does with a step's orders: it drops and encodes items, and needs the encoder
output under each token that it computes. A real one ends where an output is missing; see tests/engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_suite.fleet.tiny_media import write

BLOCK = 32
BLOCKS = 64


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Items as ``(text tokens before it, its tokens, which picture)``, and the tokens of text behind the last one, of
    which chat templates have some: a prompt that is computed to its end has its first token sampled."""

    items: tuple[tuple[int, int, int], ...]
    tail: int

    def places(self) -> list[tuple[int, int, str]]:
        """First token, length and identifier of each item. A picture has one length wherever it comes."""
        found, at = [], 0
        sizes: dict[int, int] = {}
        for text, length, picture in self.items:
            size = sizes.setdefault(picture, length)
            found.append((at + text, size, f"p{picture}"))
            at += text + size
        return found

    def tokens(self) -> int:
        first, length, _ = self.places()[-1]
        return first + length + self.tail


ITEM = st.tuples(st.integers(0, 6), st.integers(1, 40), st.integers(0, 30))
PROMPT = st.builds(Prompt, st.lists(ITEM, min_size=1, max_size=8).map(tuple), st.integers(1, 5))


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> NewMachine:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.structured_output import StructuredOutputManager

    model = write("qwen2_5_vl", tmp_path_factory.mktemp("model") / "tiny")
    store = {"shared_storage_path": str(tmp_path_factory.mktemp("store"))}
    transfer = {"ec_connector": "ECExampleConnector", "ec_role": "ec_both", "ec_connector_extra_config": store}
    args = EngineArgs(
        model=str(model), max_model_len=1024, block_size=BLOCK, ec_transfer_config=transfer, max_num_seqs=4
    )
    config = args.create_engine_config()
    init_none_hash(sha256)
    grammars = StructuredOutputManager(config)
    return lambda ahead, cache: Machine(config, grammars, ahead, cache)


NewMachine = Callable[[bool, int], "Machine"]


class Machine:
    """A scheduler and the books of its worker. With ``ahead`` a step is scheduled before the last one is reported."""

    def __init__(self, config: Any, grammars: Any, ahead: bool, cache: int) -> None:
        import torch
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        from vllm_suite.compat.encode_only import EncodeOnlyAsyncScheduler, EncodeOnlyScheduler

        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
        config.cache_config.num_gpu_blocks = BLOCKS
        self.scheduler = (EncodeOnlyAsyncScheduler if ahead else EncodeOnlyScheduler)(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=grammars,
            log_stats=False,
            block_size=BLOCK,
        )
        manager = self.scheduler.encoder_cache_manager
        manager.cache_size = manager.num_free_slots = manager.num_freeable_slots = cache
        self.scheduler.max_num_encoder_input_tokens = cache
        self.ahead = ahead
        self.kept: set[str] = set()
        self.encoded: list[str] = []
        self.stored: set[str] = set()  # by steps that have been reported
        self.tokens = 0
        self.steps: list[tuple[Any, list[str]]] = []
        self.wanted: dict[str, set[str]] = {}
        self.answers: dict[str, Any] = {}

    def add(self, name: str, prompt: Prompt, mark: Any = True) -> None:
        from vllm import SamplingParams
        from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=1, extra_args={"ec_transfer_params": {"suite_encode_only": mark}})
        items = [
            MultiModalFeatureSpec(None, "image", identifier, PlaceholderRange(offset=first, length=length), identifier)
            for first, length, identifier in prompt.places()
        ]
        self.wanted[name] = {item.identifier for item in items}
        hashes = get_request_block_hasher(BLOCK, sha256)
        tokens = [7] * prompt.tokens()
        self.scheduler.add_request(Request(name, tokens, params, None, mm_features=items, block_hasher=hashes))

    def run(self, preempt_after: int | None = None) -> None:
        for step in range(200):
            if not self.scheduler.has_unfinished_requests():
                while self.steps:
                    self._report()
                return
            if step == preempt_after:
                self.scheduler.reset_prefix_cache(reset_running_requests=True)
            self._schedule()
            if not self.ahead or len(self.steps) == 2 or not self.steps[-1][0].num_scheduled_tokens:
                self._report()
        raise AssertionError("a request never ends")

    def _schedule(self) -> None:
        output = self.scheduler.schedule()
        self.kept -= set(output.free_encoder_mm_hashes)
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        made = [
            self.scheduler.requests[name].mm_features[item].identifier
            for name, items in output.scheduled_encoder_inputs.items()
            for item in items
        ]
        self.encoded += made
        self.kept.update(made)
        for name, count in output.num_scheduled_tokens.items():
            end = starts[name] + count
            for item in self.scheduler.requests[name].mm_features:
                place = item.mm_position
                if place.offset < end and starts[name] < place.offset + place.length:
                    assert item.identifier in self.kept, "the worker would end here"
            self.tokens += count
        self.steps.append((output, made))

    def _report(self) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        output, made = self.steps.pop(0)
        self.stored.update(made)
        names = list(output.num_scheduled_tokens)
        sampled = [[] if self._prefills(name) else [1] for name in names]
        result = ModelRunnerOutput(names, {name: place for place, name in enumerate(names)}, sampled)
        for outputs in self.scheduler.update_from_output(output, result).values():
            for answer in outputs.outputs:
                assert self.wanted[answer.request_id] <= self.stored, "answered before it was encoded"
                self.answers[answer.request_id] = answer

    def _prefills(self, name: str) -> bool:
        request = self.scheduler.requests.get(name)
        return request is None or request.num_computed_tokens < request.num_tokens

    def nothing_left(self) -> None:
        core = self.scheduler
        assert (core.running, len(core.waiting), core._encoding) == ([], 0, {})
        assert core.encoder_cache_manager.request_cached_ids == {}
        assert core.encoder_cache_manager.num_freeable_slots == core.encoder_cache_manager.cache_size
        assert core.kv_cache_manager.block_pool.get_num_free_blocks() == BLOCKS - 1  # one is never given out


PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@PROPERTY
@given(PROMPT, st.booleans(), st.integers(40, 120))
def test_every_item_is_encoded_once_with_a_token_a_step(
    machine: NewMachine, prompt: Prompt, ahead: bool, cache: int
) -> None:
    m = machine(ahead, cache)
    m.add("r", prompt)
    m.run()
    m.nothing_left()
    answer = m.answers["r"]
    assert str(answer.finish_reason) == "stop"
    wanted = {identifier for _, _, identifier in prompt.places()}
    assert set(m.encoded) == wanted
    assert answer.ec_transfer_params.keys() == wanted
    if sum(length for _, length, _ in prompt.places()) <= cache:
        assert m.tokens <= len(prompt.items)
        assert len(m.encoded) == len(wanted)
    assert m.tokens <= prompt.tokens() + len(prompt.items)


@PROPERTY
@given(st.lists(st.tuples(PROMPT, st.booleans()), min_size=2, max_size=4), st.booleans(), st.integers(40, 120))
def test_several_requests_and_others_beside_them(
    machine: NewMachine, prompts: list[tuple[Prompt, bool]], ahead: bool, cache: int
) -> None:
    sizes: dict[str, int] = {}
    for prompt, _ in prompts:  # a picture has one size in all requests
        if any(sizes.setdefault(name, length) != length for _, length, name in prompt.places()):
            return
    m = machine(ahead, cache)
    for number, (prompt, mark) in enumerate(prompts):
        m.add(str(number), prompt, mark)
    m.run()
    m.nothing_left()
    assert len(m.answers) == len(prompts)
    for number, (_, mark) in enumerate(prompts):
        assert str(m.answers[str(number)].finish_reason) == ("stop" if mark else "length")


@PROPERTY
@given(PROMPT, st.booleans(), st.integers(40, 120), st.integers(0, 6))
def test_a_preempted_request_starts_again(
    machine: NewMachine, prompt: Prompt, ahead: bool, cache: int, after: int
) -> None:
    m = machine(ahead, cache)
    m.add("r", prompt)
    m.run(preempt_after=after)
    m.nothing_left()
    assert set(m.encoded) == {identifier for _, _, identifier in prompt.places()}
    assert str(m.answers["r"].finish_reason) == "stop"


@pytest.mark.parametrize("mark", [1, "true", None, {}, False])
def test_another_value_is_somebody_elses(machine: NewMachine, mark: Any) -> None:
    m = machine(False, 120)
    prompt = Prompt(((3, 20, 1), (2, 20, 2)), 4)
    m.add("r", prompt, mark)
    m.run()
    assert (str(m.answers["r"].finish_reason), m.tokens) == ("length", prompt.tokens())
