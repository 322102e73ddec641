"""One item over two encoders, on real engines: the slices make up what one encoder would have made, to the bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from epd_engine import Answer, Ask, EpdEngine, Spec, engines
from epd_stage import SUITE, _worker, flip, new_uuid
from internvl_chat import write_internvl_chat

from vllm_suite.encoded import Pending, Slice, Where, slice_identifier
from vllm_suite.fleet.pictures_parts import Part, frames_part, image_part, text_part, video_part
from vllm_suite.fleet.tiny_media import write

QUESTION = text_part("What is it?")
ROOM = {**SUITE, "receive_bytes": 1 << 20}
Make = Callable[[str, int], Part]

# Every picture is cut by InternVL's own processor into several tiles of 112 pixels and a thumbnail, films into frames.
CASES: dict[str, dict[str, Make]] = {
    "internvl": {
        "picture of 7 tiles": lambda uuid, seed: image_part(336, 224, seed, uuid=uuid),
        "JPEG of odd sides": lambda uuid, seed: image_part(517, 123, seed, "jpeg", uuid=uuid),
        "film": lambda uuid, seed: video_part(112, 112, 6, seed, uuid=uuid),
        "frames": lambda uuid, seed: frames_part(150, 90, 5, seed, uuid=uuid),
    },
    "internvl_chat": {
        "picture of 7 tiles": lambda uuid, seed: image_part(336, 224, seed, uuid=uuid),
        "frames": lambda uuid, seed: frames_part(150, 90, 5, seed, uuid=uuid),
    },
    "qwen2_5_vl": {
        "film": lambda uuid, seed: video_part(112, 112, 20, seed, uuid=uuid),
        "frames": lambda uuid, seed: frames_part(112, 56, 7, seed, uuid=uuid),
    },
    "qwen3_vl": {
        "film": lambda uuid, seed: video_part(112, 112, 10, seed, uuid=uuid),
        "frames": lambda uuid, seed: frames_part(112, 56, 7, seed, uuid=uuid),
    },
}
FAMILIES = ["internvl", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "internvl")]


class Fleet:
    """One engine alone, two encoders, and one that computes prompts."""

    def __init__(self, family: str, mono: EpdEngine, *apart: EpdEngine) -> None:
        self.family, self.mono, self.es, self.pd = family, mono, apart[:2], apart[2]

    def slices(self, part: Part, count: int = 2) -> list[dict[str, Any]]:
        """Have an item encoded in slices, in turn here and there; what each encoder says of its own."""
        return [self.slice(part, index, count) for index in range(count)]

    def slice(self, part: Part, index: int, count: int = 2, at: int | None = None) -> dict[str, Any]:
        whole = part["uuid"]
        name = slice_identifier(whole, index, count)
        pieces = {name: msgspec.to_builtins(Slice(whole, index, count))}
        encoder = self.es[(index if at is None else at) % 2]
        asked = {"suite_encode_only": True, "suite_slices": pieces}
        answer = encoder.ask([{**part, "uuid": name}], ec=asked, max_tokens=1)
        assert answer.ec is not None
        ((identifier, entry),) = answer.ec.items()
        assert identifier == name, answer.ec
        said = entry["suite_slice"]
        assert (said["of"], said["index"], said["count"]) == (whole, index, count)
        assert entry["metadata"] == {}
        return dict(entry)

    def ask(self, part: Part, entries: list[dict[str, Any]]) -> Answer:
        sources = [{key: entry[key] for key in ("suite", "suite_pending") if key in entry} for entry in entries]
        return self.pd.ask([part, QUESTION], ec={part["uuid"]: {"suite_slices": sources}})

    def alone(self, part: Part) -> Answer:
        return self.mono.ask([{**part, "uuid": new_uuid()}, QUESTION])

    def place(self, at: int) -> Where:
        entry = self.slice(image_part(336, 224, 77, uuid=new_uuid()), 0, at=at)["suite"]
        return Where(entry["producer"], entry["epoch"], entry["claim_host"], entry["claim_port"])

    def counter(self, name: str, **labels: str) -> float:
        return self.pd.metric(f"vllm_suite_ec_{name}_total", **labels)


@pytest.fixture(scope="module", params=FAMILIES)
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    family, folder = request.param, tmp_path_factory.mktemp("media") / request.param
    model = write_internvl_chat(folder) if family == "internvl_chat" else write(family, folder)
    options: dict[str, Any] = {"llm": {"trust_remote_code": family == "internvl_chat"}}
    es = [Spec(f"e{number}", model, "e", suite=ROOM, **options) for number in (1, 2)]
    consumer = Spec("pd", model, "pd", suite=ROOM, **options)
    with engines(Spec("mono", model, "mono", **options), *es, consumer) as started:
        yield Fleet(request.param, *started)


@pytest.fixture
def tiled(fleet: Fleet) -> Fleet:
    if fleet.family != "internvl":
        pytest.skip("one family shows it")
    return fleet


def test_slices_make_up_the_item(fleet: Fleet) -> None:
    for name, make in CASES[fleet.family].items():
        for count in (2, 3):
            part = make(new_uuid(), 1)
            want = fleet.alone(part)
            before = [e.counts().rows for e in fleet.es]
            joined = fleet.counter("joined_items")
            entries = fleet.slices(part, count)
            rows = [entry["suite"]["tokens"] for entry in entries]
            # The encoders have computed every row once, and neither of them all.
            assert sum(rows) == entries[0]["suite_slice"]["rows"], name
            computed = [e.counts().rows - old for e, old in zip(fleet.es, before, strict=True)]
            assert sum(computed) == sum(rows), name
            assert min(computed) > 0, name
            with fleet.pd.encodes(0):
                assert fleet.ask(part, entries).said() == want.said(), name
            assert fleet.counter("joined_items") == joined + 1


def test_pictures_of_any_size(tiled: Fleet) -> None:
    rng = random.Random(7)
    for seed in range(12):
        part = image_part(rng.randrange(150, 700), rng.randrange(120, 400), seed, uuid=new_uuid())
        count = rng.randrange(2, 4)
        answer = tiled.es[0].ask(
            [{**part, "uuid": slice_identifier(part["uuid"], 0, count)}],
            ec={"suite_encode_only": True, "suite_slices": {}},
            max_tokens=1,
        )
        assert answer.ec is not None
        (whole,) = answer.ec.values()  # not said to be a slice, so it is none
        tiles = whole["suite"]["tokens"] // 16
        assert "suite_slice" not in whole
        if tiles < count:
            continue
        part = {**part, "uuid": new_uuid()}
        with tiled.pd.encodes(0):
            assert tiled.ask(part, tiled.slices(part, count)).said() == tiled.alone(part).said(), (seed, tiles, count)


def test_slices_under_way_and_one_that_another_encoder_makes(tiled: Fleet) -> None:
    part = image_part(336, 224, 3, uuid=new_uuid())
    want = tiled.alone(part)
    places = [tiled.place(at) for at in (0, 1)]
    sources = []
    for index in range(2):
        name = slice_identifier(part["uuid"], index, 2)
        pending = Pending(identifier=name, candidates=(places[index], places[1 - index]), wait_s=20.0)
        sources.append({"suite_pending": msgspec.to_builtins(pending)})
    tiled.pd.send("ask", [Ask([part, QUESTION], ec={part["uuid"]: {"suite_slices": sources}})])
    tiled.slice(part, 0, at=0)
    tiled.slice(part, 1, at=0)  # its own encoder was to be the other one
    (answer,) = tiled.pd.receive(60.0)
    assert answer.said() == want.said()


def drop(_llm: Any, identifier: str) -> None:
    assert _worker()._pool.drop(identifier)


def refused(fleet: Fleet, part: Part, entries: list[dict[str, Any]], reason: str) -> None:
    """The item is refused, encoded on the consumer, and counted; the answer is the right one."""
    want = fleet.alone(part)
    before = {name: fleet.counter(name, reason=reason) for name in ("refused", "local_encodes")}
    with fleet.pd.encodes(1):
        assert fleet.ask(part, entries).said() == want.said()
    assert {name: fleet.counter(name, reason=reason) - old for name, old in before.items()} == {
        "refused": 1,
        "local_encodes": 1,
    }


def test_a_slice_that_is_lost(tiled: Fleet) -> None:
    part = image_part(336, 224, 4, uuid=new_uuid())
    entries = tiled.slices(part)
    tiled.es[1].call(drop, slice_identifier(part["uuid"], 1, 2))
    refused(tiled, part, entries, "expired")


@pytest.mark.parametrize("how", ["swapped", "twice the same", "of another picture", "two of three"])
def test_slices_in_another_order_or_of_another_item(tiled: Fleet, how: str) -> None:
    part, other = (image_part(336, 224, seed, uuid=new_uuid()) for seed in (5, 6))
    first, second = tiled.slices(part)
    entries = {
        "swapped": [second, first],
        "twice the same": [first, first],
        "of another picture": [first, tiled.slice(other, 1)],
        "two of three": tiled.slices(part, 3)[:2],
    }[how]
    refused(tiled, part, entries, "foreign_content")


@pytest.mark.parametrize(("change", "reason"), [(-1, "truncated"), (1, "wrong_shape")])
def test_rows_that_are_not_those_of_the_item(tiled: Fleet, change: int, reason: str) -> None:
    part = image_part(336, 224, 8, uuid=new_uuid())
    first, second = tiled.slices(part)
    first["suite"] = {**first["suite"], "tokens": first["suite"]["tokens"] + change}
    refused(tiled, part, [first, second], reason)


def test_a_slice_whose_bytes_have_changed(tiled: Fleet) -> None:
    part = image_part(336, 224, 9, uuid=new_uuid())
    entries = tiled.slices(part)
    tiled.es[0].call(flip, slice_identifier(part["uuid"], 0, 2))
    refused(tiled, part, entries, "bad_checksum")


def test_an_item_that_cannot_be_cut_is_encoded_whole(fleet: Fleet) -> None:
    """One tile; or a picture of a family whose pictures stay whole."""
    part = image_part(112, 112, 10, uuid=new_uuid())
    name = slice_identifier(part["uuid"], 1, 2)
    asked = {"suite_encode_only": True, "suite_slices": {name: {"of": part["uuid"], "index": 1, "count": 2}}}
    answer = fleet.es[0].ask([{**part, "uuid": name}], ec=asked, max_tokens=1)
    assert answer.ec is not None
    assert set(answer.ec) == {part["uuid"]}
    with fleet.pd.encodes(0):
        got = fleet.pd.ask([part, QUESTION], ec={part["uuid"]: {"suite": answer.ec[part["uuid"]]["suite"]}})
    assert got.said() == fleet.alone(part).said()


def test_the_same_slice_again_is_not_encoded_again(tiled: Fleet) -> None:
    part = image_part(336, 224, 11, uuid=new_uuid())
    entries = tiled.slices(part)
    with tiled.es[0].encodes(0), tiled.es[1].encodes(0):
        again = tiled.slices(part)
    assert [entry["suite_slice"] for entry in again] == [entry["suite_slice"] for entry in entries]
    with tiled.pd.encodes(0):
        assert tiled.ask(part, again).said() == tiled.alone(part).said()
