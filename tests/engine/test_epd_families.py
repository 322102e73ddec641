"""Every family of tiny multimodal checkpoints on real engines: one engine alone, and encoders apart from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from epd_engine import Answer, Ask, EpdEngine, Spec, engines, references, without_media

from vllm_suite.fleet.pictures_parts import Part, audio_part, frames_part, image_part, text_part, video_part
from vllm_suite.fleet.tiny_media import FAMILIES, Family, write

QUESTION = text_part("What is it?")
Make = Callable[[int], list[Part]]  # from a seed to the media parts of a request

PICTURES: dict[str, Make] = {
    "picture": lambda seed: [image_part(112, 112, seed, uuid=f"s-picture-{seed}")],
    "two pictures": lambda seed: [
        image_part(336, 160, seed, "jpeg", uuid=f"s-wide-{seed}"),
        image_part(96, 128, seed + 50, uuid=f"s-small-{seed}"),
    ],
}
FILMS: dict[str, Make] = {
    "film": lambda seed: [video_part(112, 112, 6, seed, uuid=f"s-film-{seed}")],
    "frames and a picture": lambda seed: [
        frames_part(112, 56, 4, seed, uuid=f"s-frames-{seed}"),
        image_part(64, 64, seed, uuid=f"s-still-{seed}"),
    ],
}
SOUNDS: dict[str, Make] = {
    "sound": lambda seed: [audio_part(1.0, seed, uuid=f"s-sound-{seed}")],
    "two sounds": lambda seed: [
        audio_part(0.7, seed, uuid=f"s-short-{seed}"),
        audio_part(1.6, seed + 50, uuid=f"s-long-{seed}"),
    ],
}
CASES: dict[str, dict[str, Make]] = {
    "qwen2_5_vl": PICTURES | FILMS,
    "qwen3_vl": PICTURES | FILMS,
    "internvl": PICTURES,
    "llava_onevision": PICTURES,
    "qwen2_audio": SOUNDS,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Path]:
    folder = tmp_path_factory.mktemp("media")
    return lambda family: write(family, folder / family)


# --- one engine ---


@pytest.fixture(scope="module", params=FAMILIES)
def alone(request: pytest.FixtureRequest, checkpoints: Callable[[Family], Path]) -> Iterator[tuple[str, EpdEngine]]:
    with engines(Spec("alone", checkpoints(request.param), "mono")) as (engine,):
        yield request.param, engine


def test_the_answer_depends_on_the_media_and_on_nothing_else(alone: tuple[str, EpdEngine]) -> None:
    family, engine = alone
    for name, make in CASES[family].items():
        one, other = engine.ask([*make(1), QUESTION]), engine.ask([*make(2), QUESTION])
        assert engine.ask([*make(1), QUESTION]).said() == one.said(), name
        assert one.tokens != other.tokens, name
        if len(make(1)) == 2:
            first, second = make(1)
            swapped = engine.ask([second, first, QUESTION])
            assert swapped.tokens != one.tokens, name
            # The second item counts as much as the first.
            assert engine.ask([first, make(2)[1], QUESTION]).tokens != one.tokens, name


def test_media_without_a_question_and_a_question_without_media(alone: tuple[str, EpdEngine]) -> None:
    family, engine = alone
    (item,) = next(iter(CASES[family].values()))(1)
    bare, asked, text = engine.ask([item]), engine.ask([item, QUESTION]), engine.ask([QUESTION])
    assert len({tuple(answer.tokens) for answer in (bare, asked, text)}) == 3
    assert text.prompt_tokens < bare.prompt_tokens < asked.prompt_tokens


@pytest.mark.parametrize("alone", ["qwen2_5_vl", "internvl"], indirect=True)
def test_pictures_of_every_size_are_told_apart(alone: tuple[str, EpdEngine]) -> None:
    _, engine = alone
    said: dict[tuple[int, ...], str] = {}
    for width, height in ((28, 28), (64, 64), (224, 224), (448, 96), (96, 448), (500, 333)):
        for seed in (1, 2):
            tokens = tuple(engine.ask([image_part(width, height, seed), QUESTION]).tokens)
            assert tokens not in said, f"{width}x{height}, seed {seed}, is taken for {said[tokens]}"
            said[tokens] = f"{width}x{height}, seed {seed}"


def test_the_probe_counts_what_the_encoder_computes(alone: tuple[str, EpdEngine]) -> None:
    family, engine = alone
    for name, make in CASES[family].items():
        parts = make(90)
        with engine.encodes(len(parts)):
            answer: Answer = engine.ask([*parts, QUESTION])
        with engine.encodes(0):  # vLLM keeps the outputs of recent items
            assert engine.ask([*parts, QUESTION]).said() == answer.said(), name
    with engine.encodes(0):
        engine.ask([QUESTION])


# --- the encoder apart ---


@dataclass
class Fleet:
    """A monolithic engine to compare with, and the same model in parts. ``budget`` is the others' tokens a step."""

    family: str
    caching: bool
    mono: EpdEngine
    e: EpdEngine
    pd: EpdEngine
    p: EpdEngine
    d: EpdEngine

    def media(self, seed: int) -> list[Part]:
        """Two items, the second larger."""
        return CASES[self.family]["two sounds" if self.family == "qwen2_audio" else "two pictures"](seed)

    def bare(self, parts: list[Part], ec: dict[str, Any]) -> list[Part]:
        return without_media(self.family, parts, ec)

    def decode(self, parts: list[Part], ec: dict[str, Any]) -> Answer:
        kv = self.p.prefill(parts, references(ec))
        return self.d.ask(parts, ec=references(ec), kv=kv)


def same(got: Answer, want: Answer) -> None:
    """Token for token; the numbers may differ in the last bits, as chunks and batches are of other sizes."""
    assert got.finish_reason == "length"
    assert got.tokens == want.tokens
    assert got.logprobs == pytest.approx(want.logprobs, abs=1e-3)


# A small budget cuts the prompt into chunks, also within an item. One variation for each family by default.
VARIATIONS = [(None, False), (48, True), (48, False), (None, True)]
SAMPLE = {
    ("qwen2_5_vl", 48, True),
    ("qwen3_vl", 48, False),
    ("internvl", None, True),
    ("llava_onevision", None, False),
    ("qwen2_audio", 48, True),
}
PRODUCT = [
    pytest.param(
        (family, budget, caching),
        id=f"{family}-{f'{budget} tokens a step' if budget else 'whole prompts'}-{'caching' if caching else 'plain'}",
        marks=() if (family, budget, caching) in SAMPLE else pytest.mark.slow,
    )
    for family in FAMILIES
    for budget, caching in VARIATIONS
]


@pytest.fixture(scope="module", params=PRODUCT)
def fleet(request: pytest.FixtureRequest, checkpoints: Callable[[Family], Path]) -> Iterator[Fleet]:
    family, budget, caching = request.param
    model = checkpoints(family)
    llm = {} if budget is None else {"max_num_batched_tokens": budget, "long_prefill_token_threshold": budget}
    apart = [Spec(role, model, role, prefix_caching=caching, llm=llm) for role in ("pd", "p", "d")]  # type: ignore[arg-type]
    with engines(Spec("mono", model, "mono"), Spec("e", model, "e"), *apart) as started:
        yield Fleet(family, caching, *started)


def test_every_kind_of_media_through_prefill_and_decode_in_one(fleet: Fleet) -> None:
    for name, make in CASES[fleet.family].items():
        parts = make(1)
        want = fleet.mono.ask([*parts, QUESTION])
        with fleet.e.encodes(len(parts)):
            ec = fleet.e.encode(parts)
        assert set(references(ec)) == {part["uuid"] for part in parts}, name
        with fleet.pd.encodes(0):
            same(fleet.pd.ask([*parts, QUESTION], ec=references(ec)), want)
    assert fleet.pd.metric("vllm_suite_ec_fetches_total", outcome="ok") > 0


def test_every_kind_of_media_through_prefill_and_decode_apart(fleet: Fleet) -> None:
    for make in CASES[fleet.family].values():
        parts = make(2)
        want = fleet.mono.ask([*parts, QUESTION])
        ec = fleet.e.encode(parts)
        with fleet.p.encodes(0), fleet.d.encodes(0):
            same(fleet.decode(fleet.bare([*parts, QUESTION], ec), ec), want)


def test_items_that_are_named_and_not_sent(fleet: Fleet) -> None:
    for make in CASES[fleet.family].values():
        parts = make(3)
        want = fleet.mono.ask([*parts, QUESTION])
        ec = fleet.e.encode(parts)
        with fleet.pd.encodes(0):
            same(fleet.pd.ask(fleet.bare([*parts, QUESTION], ec), ec=references(ec)), want)


def test_the_same_items_again(fleet: Fleet) -> None:
    parts = [*fleet.media(4), QUESTION]
    want = fleet.mono.ask(parts)
    ec = fleet.e.encode(parts)
    bare = fleet.bare(parts, ec)
    with fleet.e.encodes(0), fleet.pd.encodes(0), fleet.p.encodes(0):
        for round_ in range(3):
            again = fleet.e.encode(parts)
            got = fleet.pd.ask(bare, ec=references(again))
            same(got, want)
            assert (got.cached_tokens > 0) == (fleet.caching and round_ > 0)
            same(fleet.decode(bare, again), want)
    # Within one request, and in another order after a question of its own.
    first, second = fleet.media(4)
    asked = [text_part("Compare."), second, first, second, QUESTION]
    want = fleet.mono.ask(asked)
    with fleet.e.encodes(0), fleet.pd.encodes(0):
        ec = fleet.e.encode(asked)
        assert len(ec) == 2
        same(fleet.pd.ask(fleet.bare(asked, ec), ec=references(ec)), want)


def test_text_and_media_in_one_batch(fleet: Fleet) -> None:
    asked = [
        [QUESTION],
        [*fleet.media(5), QUESTION],
        [text_part("Nothing to see here, only words, and more of them than in the others. " * 4)],
        [fleet.media(6)[0], QUESTION],
        [text_part("And "), fleet.media(5)[1], text_part(" again?")],
    ]
    want = [fleet.mono.ask(parts) for parts in asked]
    ecs = [fleet.e.encode(parts) if len(parts) > 1 else {} for parts in asked]
    bare = [fleet.bare(parts, ec) for parts, ec in zip(asked, ecs, strict=True)]
    refs = [references(ec) or None for ec in ecs]
    with fleet.pd.encodes(0):
        got = fleet.pd.ask_many([Ask(parts, ec=ref) for parts, ref in zip(bare, refs, strict=True)])
    for answer, one in zip(got, want, strict=True):
        same(answer, one)
    kv = [fleet.p.prefill(parts, ref) for parts, ref in zip(bare, refs, strict=True)]
    with fleet.d.encodes(0):
        got = fleet.d.ask_many([Ask(parts, ec=r, kv=k) for parts, r, k in zip(bare, refs, kv, strict=True)])
    for answer, one in zip(got, want, strict=True):
        same(answer, one)


def test_one_item_encoded_elsewhere_and_another_not(fleet: Fleet) -> None:
    for seed, known in ((7, 0), (8, 1)):
        parts = fleet.media(seed)
        want = fleet.mono.ask([*parts, QUESTION])
        ec = fleet.e.encode([parts[known]])
        with fleet.pd.encodes(1):
            same(fleet.pd.ask([*parts, QUESTION], ec=references(ec)), want)
        with fleet.p.encodes(1), fleet.d.encodes(0):
            same(fleet.decode([*parts, QUESTION], ec), want)


def test_the_answer_is_computed_from_what_the_encoder_sent(fleet: Fleet) -> None:
    """The other tests would pass if consumers had the right items from anywhere else."""
    (one, _), (other, _) = fleet.media(9), fleet.media(10)
    name = f"s-swapped-{fleet.family}"
    want, unlike = fleet.mono.ask([other, QUESTION]), fleet.mono.ask([one, QUESTION])
    assert want.tokens != unlike.tokens
    ec = fleet.e.encode([{**other, "uuid": name}])
    asked = fleet.bare([{**one, "uuid": name}, QUESTION], ec)
    with fleet.pd.encodes(0):
        same(fleet.pd.ask(asked, ec=references(ec)), want)
    same(fleet.decode(asked, ec), want)
