"""Engines against the plain reference: greedy tokens equal, log-probabilities within `swiftkv_engine.TOLERANCE`, and
the rows that the tail computes exactly those that are sampled.

A sample of every dimension runs always; the whole products are marked slow (`make test-all`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import swiftkv_engine as se
from swiftkv_engine import Ask, Engine, Report, tokens

Checkpoint = Callable[..., Path]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
GROUPS = (1, 2, 4)
BUDGETS = (32, 48, 128, 1024)
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def shape(cut: str, group: int) -> dict[str, int]:
    """Layers and cut: after the first layer, half, and as late as the group allows."""
    first, half, last = {"layers": 9, "cut": 1}, {"layers": 8, "cut": 4}, {"layers": 8, "cut": 8 - group}
    return {"first": first, "half": half, "last": last}[cut]


# Prompts below, at and above a block and every budget; arrivals that mix prompts with decodes in one step.
BATCH = [
    Ask(tokens(n), max_tokens=m, at=at)
    for n, m, at in ((67, 8, 0), (5, 20, 0), (364, 6, 1), (32, 8, 2), (1, 9, 2), (128, 5, 4), (33, 4, 9), (64, 3, 11))
]
# After BATCH, in its cache: the same prompt, one cached to its last token, a longer one, one that parts half way.
HITS = [
    Ask(tokens(364), max_tokens=6),
    Ask(tokens(128), max_tokens=5),
    Ask(tokens(364) + tokens(40, 1), max_tokens=6, at=1),
    Ask(tokens(364)[:200] + tokens(90, 2), max_tokens=6, at=1),
    Ask(tokens(70, 3), max_tokens=6, at=2),
]


def check(model: Path, engine: Engine, asks: list[Ask], armed: bool, eager: bool = True) -> Report:
    report = engine.run(asks)
    se.compare(model, asks, report)
    if armed:
        se.skipped_exactly(report, eager)
    else:
        se.skipped_nothing(report)
    return report


def serve_and_hit(model: Path, engine: Engine, armed: bool, eager: bool = True) -> None:
    engine.call(se.poison)
    first = check(model, engine, BATCH, armed, eager)
    assert not any(answer.cached for answer in first.answers)
    second = check(model, engine, HITS, armed, eager)
    # The last token of a prompt is always computed, so a prompt of whole blocks loses its last one.
    assert [answer.cached for answer in second.answers] == [352, 96, 352, 192, 0]


# --- cuts, groups, families, budgets, flag, prefix cache ---

# Every family, every cut, every group, every budget, the skip on and off.
SAMPLE = [
    ("llama", "half", 1, 32, True),
    ("llama", "last", 2, 48, False),
    ("mistral", "half", 4, 48, True),
    ("qwen2", "first", 2, 32, True),
    ("qwen3", "last", 4, 1024, True),
    ("qwen3_moe", "last", 1, 128, True),
]
WHOLE = [
    (family, cut, group, budget, armed)
    for family, cut, group, budget in itertools.product(FAMILIES, ("first", "half", "last"), GROUPS, BUDGETS)
    for armed in ((True, False) if budget == 48 else (True,))
]


@pytest.mark.parametrize(
    ("family", "cut", "group", "budget", "armed"),
    [*SAMPLE, *(pytest.param(*case, marks=pytest.mark.slow) for case in WHOLE if case not in SAMPLE)],
)
def test_equals_the_reference(
    checkpoint: Checkpoint, family: str, cut: str, group: int, budget: int, armed: bool
) -> None:
    model = checkpoint(family, group=group, **shape(cut, group))
    with se.engine(model, armed=armed, budget=budget) as engine:
        serve_and_hit(model, engine, armed)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
        pytest.param("qwen3", {"tie_word_embeddings": True}, marks=pytest.mark.slow),
        pytest.param("qwen2", {"tie_word_embeddings": True}, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", {"mlp_only_layers": [1, 5], "norm_topk_prob": False}, marks=pytest.mark.slow),
        pytest.param(
            "llama",
            {
                "rope_scaling": {
                    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
                    "original_max_position_embeddings": 256,
                }
            },
            marks=pytest.mark.slow,
        ),
        pytest.param("llama", {"num_key_value_heads": 4, "num_attention_heads": 4}, marks=pytest.mark.slow),
    ],
)
def test_equals_the_reference_in_other_shapes(checkpoint: Checkpoint, family: str, config: dict[str, object]) -> None:
    model = checkpoint(family, layers=8, cut=4, group=2, **config)
    with se.engine(model, budget=48) as engine:
        serve_and_hit(model, engine, armed=True)


# --- preemption ---

RESUMED = [("qwen2", 2, True, True), ("qwen2", 2, True, False), ("llama", 1, False, True)]


@pytest.mark.parametrize(
    ("family", "group", "armed", "cached"),
    [
        *RESUMED,
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(FAMILIES, GROUPS, (True, False), (True, False))
            if case not in RESUMED
        ),
    ],
)
def test_preempted_requests_resume_exactly(
    checkpoint: Checkpoint, family: str, group: int, armed: bool, cached: bool
) -> None:
    model = checkpoint(family, layers=8, cut=4, group=group)
    # 14 blocks of 32 tokens for 6 requests that end at 3 to 5 blocks each.
    asks = [Ask(tokens(40 + 17 * i, 5), max_tokens=45, at=i) for i in range(6)]
    with se.engine(model, armed=armed, budget=64, blocks=14, llm={"enable_prefix_caching": cached}) as engine:
        engine.call(se.poison)
        report = check(model, engine, asks, armed)
    assert report.preemptions > 0


# --- speculation ---


@pytest.mark.parametrize(
    ("family", "group", "armed"),
    [
        ("qwen3", 2, True),
        *(
            pytest.param(family, group, armed, marks=pytest.mark.slow)
            for family, group, armed in itertools.product(FAMILIES, GROUPS, (True, False))
            if (family, group, armed) != ("qwen3", 2, True)
        ),
    ],
)
def test_ngram_speculation(checkpoint: Checkpoint, family: str, group: int, armed: bool) -> None:
    model = checkpoint(family, layers=8, cut=4, group=group)
    asks = [*repetitive(model), foretold(model)]
    with se.engine(model, armed=armed, budget=64, llm={"speculative_config": NGRAM}) as engine:
        engine.call(se.poison)
        report = check(model, engine, asks, armed)
    assert report.accepted > 0
    drafted = sum(drafts for step in report.steps for _, drafts in step.values())
    assert drafted > report.accepted, "no draft was refused"


def repetitive(model: Path) -> list[Ask]:
    """Prompts that hold their own continuation, so that drafts looked up in them are sometimes right."""
    plain = se.reference(model)
    asks = []
    for i, n in enumerate((40, 9, 70, 150)):
        text = tokens(n, 7)
        for _ in range(2):
            text += tuple(plain.greedy(list(text), 4)) * 2
        asks.append(Ask(text, max_tokens=30, at=3 * i))
    return asks


def foretold(model: Path) -> Ask:
    """A prompt that holds the two tokens its greedy answer begins with, the first of them nowhere else: a draft looked
    up in it is right."""
    plain = se.reference(model)
    for seed in range(200):
        text, answer = tokens(9, seed), (0, 0)
        for _ in range(6):
            prompt = (*text[:5], *answer, *text[5:])
            following = tuple(plain.greedy(list(prompt), 2))
            if following == answer and prompt.count(answer[0]) == 1:
                return Ask(prompt, max_tokens=30, at=1)
            answer = following
    raise AssertionError("no prompt foretells its answer")


@pytest.mark.parametrize("armed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_everything_at_once(checkpoint: Checkpoint, armed: bool) -> None:
    """Drafts, chunks, shared prefixes and preemption in the same steps."""
    model = checkpoint("llama", layers=8, cut=4, group=2)
    shared = tokens(64, 9)
    asks = repetitive(model) + [Ask(shared + tokens(9 + 20 * i, 9), max_tokens=40, at=2 * i) for i in range(5)]
    with se.engine(model, armed=armed, budget=48, blocks=18, llm={"speculative_config": NGRAM}) as engine:
        engine.call(se.poison)
        report = check(model, engine, asks, armed)
    assert report.preemptions > 0
    assert report.accepted > 0
    assert any(answer.cached for answer in report.answers)


# --- torch.compile ---


@pytest.mark.parametrize(
    ("family", "group", "armed", "speculate"),
    [
        ("qwen3", 2, True, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                *((family, 2, True, False) for family in FAMILIES if family != "qwen3"),
                *((family, 1, False, False) for family in FAMILIES),
                ("qwen3", 4, True, False),
                ("llama", 1, True, True),
            )
        ),
    ],
)
def test_compiled(
    checkpoint: Checkpoint, tmp_path: Path, family: str, group: int, armed: bool, speculate: bool
) -> None:
    """Both regions compiled. NaN everywhere in the caches first: a late key that is not written shows at once."""
    model = checkpoint(family, layers=6, cut=2, group=group)  # the compiler's time goes with the layers
    llm = {"speculative_config": NGRAM} if speculate else {}
    cold = {"VLLM_CACHE_ROOT": str(tmp_path)}
    with se.engine(model, armed=armed, eager=False, budget=48, env=cold, llm=llm) as engine:
        assert engine.call(compiled_regions) == {"Head": True, "Tail": True}
        serve_and_hit(model, engine, armed, eager=False)
        if speculate:
            asks = [*repetitive(model), foretold(model)]
            assert check(model, engine, asks, armed, eager=False).accepted > 0


def compiled_regions(llm: object) -> dict[str, bool]:
    model = se.runner(llm).model.model
    return {type(region).__name__: not region.do_not_compile for region in (model.head, model.tail)}


@pytest.mark.slow
def test_compiled_code_from_the_cache_takes_new_weights(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """What is stored of one model serves another of the same shape: weights are inputs, never constants."""
    for seed in (0, 1):
        model = checkpoint("llama", layers=8, cut=4, group=2, seed=seed)
        cold = {"VLLM_CACHE_ROOT": str(tmp_path)}
        with se.engine(model, eager=False, budget=48, env=cold) as engine:
            serve_and_hit(model, engine, armed=True, eager=False)
