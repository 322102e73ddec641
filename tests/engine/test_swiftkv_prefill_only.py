"""A prefill-only instance holds about half the weights and hands over the KV cache of a whole one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pair import SUITE, Pair
from pd import Engine, Spec, engines
from reference_swiftkv import Reference, load
from swiftkv_checkpoints import make_swiftkv_checkpoint

from vllm_swiftkv.sizes import sizes

ONLY = {"suite": {"swiftkv": {"prefill_only": True}}}
ENV = {"VLLM_SUITE_PLUGINS": "swiftkv"}
LENGTHS = (5, 31, 32, 33, 64, 100, 300, 700)


@dataclass
class Three:
    """A whole prefill instance, a prefill-only one, and the decode instance that pulls from both."""

    whole: Engine
    only: Engine
    d: Engine
    reference: Reference


def _spec(name: str, model: Path, **llm: Any) -> Spec:
    return Spec(name, model, suite=SUITE, env=ENV, llm={"max_num_batched_tokens": 256, **llm})


KINDS = [
    pytest.param(("llama", 1), id="llama", marks=pytest.mark.slow),
    pytest.param(("qwen3", 2), id="qwen3, groups of two"),
]


@pytest.fixture(scope="module", params=KINDS)
def three(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Three]:
    family, group = request.param
    model = tmp_path_factory.mktemp("model") / "swiftkv"
    make_swiftkv_checkpoint(model, family, layers=8, cut=4, group=group)
    specs = (_spec("whole", model), _spec("only", model, additional_config=ONLY), _spec("d", model))
    with engines(*specs) as (whole, only, d):
        yield Three(whole, only, d, load(model))


def parameter_bytes(llm: Any) -> int:
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.get_model()
    return sum(4 * _held(module) for module in model.modules())


def _held(module: Any) -> int:
    """Parameters of one module. On CPU vLLM packs the weights of linear layers and keeps an empty parameter."""
    weight = getattr(module, "weight", None)
    if weight is not None and hasattr(module, "output_size_per_partition"):
        bias = getattr(module, "bias", None)
        return module.input_size_per_partition * module.output_size_per_partition + (
            0 if bias is None else bias.numel()
        )
    if weight is not None and hasattr(module, "num_embeddings_padded"):
        return module.num_embeddings_padded * module.embedding_dim
    return sum(p.numel() for p in module.parameters(recurse=False))


def tail_rows(llm: Any) -> int:
    from vllm_swiftkv.counters import COUNTERS

    return COUNTERS.tail_rows


def test_what_is_handed_over_decodes_to_the_same_tokens(three: Three) -> None:
    rng = random.Random(3)
    before = three.only.call(tail_rows)
    for length in LENGTHS:
        prompt = [rng.randrange(16, 500) for _ in range(length)]
        wanted = three.reference.greedy(prompt, 8)
        for p in (three.whole, three.only):
            pair = Pair(p, three.d)
            assert three.d.generate(prompt, p.prefill(prompt)).tokens == wanted
            pair.wait_free()
    assert three.d.metric("vllm_suite_kv_pulls_total", outcome="ok") == 2 * len(LENGTHS)
    assert three.only.call(tail_rows) == before


def test_it_holds_the_head_and_late_keys_and_values_alone(three: Three) -> None:
    split = three.reference.config["num_key_value_layers"], three.reference.config["key_value_group_size"]
    wanted = sizes(three.reference.config, *split)
    whole, only = three.whole.call(parameter_bytes), three.only.call(parameter_bytes)
    print(f"parameters: whole {whole:,} bytes, prefill-only {only:,} bytes")
    assert whole == 4 * wanted.swiftkv
    assert only == 4 * wanted.prefill_only


def test_it_never_answers_a_client(three: Three) -> None:
    with pytest.raises(RuntimeError, match=r"do_remote_decode is not true; this instance only computes prompts"):
        three.only.generate([1, 2, 3], None, 4)
    prompt = list(range(20, 60))
    assert three.d.generate(prompt, three.only.prefill(prompt)).tokens == three.reference.greedy(prompt, 8)
