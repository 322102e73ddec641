"""Every family of tiny multimodal checkpoints on real engines: one engine alone, and encoders apart from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from epd_engine import Answer, EpdEngine, Spec, engines

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
