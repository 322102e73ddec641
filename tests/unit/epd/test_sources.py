"""What a request says about its items, checked before anybody is asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from vllm_epd.sources import OwnView, Source, sound_metadata, usable
from vllm_suite.encoded import Pending, Producer, Where
from vllm_suite.handoff import Refusal

KEY = b"fleet key"
PRODUCER = Producer("e", "epoch", "model", "layout", "10.0.0.1", 5600)
PLACE = Where("e", "epoch", "10.0.0.1", 5600)


def view(key: bytes | None = None) -> OwnView:
    """As computed from a model's configuration, which a unit test has none of."""
    own = OwnView.__new__(OwnView)
    own.model, own.layout, own.key = "model", "layout", key
    return own


def reference(key: bytes | None = None, **fields: Any) -> dict[str, Any]:
    ref = PRODUCER.reference("i", "item-1", 16, 30.0, key)
    return {"suite": ref.to_json() | fields}


def pending(key: bytes | None = None, **fields: Any) -> dict[str, Any]:
    whole = {"identifier": "i", "candidates": (PLACE,), "wait_s": 5.0} | fields
    return {"suite_pending": msgspec.to_builtins(Pending(**whole).signed(key))}


def test_a_reference_and_an_item_under_way() -> None:
    for key in (None, KEY):
        own = view(key)
        source = own.source({"i": reference(key)}, "i", 16)
        assert isinstance(source, Source)
        assert source.ref is not None
        assert (source.ref.claim_host, source.ref.tokens) == ("10.0.0.1", 16)
        source = own.source({"i": pending(key)}, "i", 16)
        assert isinstance(source, Source)
        assert source.pending is not None
        assert source.pending.candidates == (PLACE,)


def test_equal_sources_have_equal_keys() -> None:
    def key(entry: dict[str, Any]) -> str:
        source = view().source({"i": entry}, "i", 16)
        assert isinstance(source, Source)
        return source.key

    assert key(reference()) == key(reference())
    assert len({key(reference()), key(reference(epoch="other")), key(pending()), key(pending(wait_s=6.0))}) == 4


@pytest.mark.parametrize("params", [None, {}, [], "i", {"other": {}}, 7])
def test_nothing_is_said_about_the_item(params: Any) -> None:
    assert view().source(params, "i", 16) is None


@pytest.mark.parametrize(
    ("entry", "refusal"),
    [
        (7, Refusal.MALFORMED),
        ({}, Refusal.UNFENCED),
        ({"suite": {}}, Refusal.MALFORMED),
        ({"suite": reference()}, Refusal.MALFORMED),
        ({"suite_error": "non_finite"}, Refusal.NON_FINITE),
        ({"suite_error": {}}, Refusal.MALFORMED),
        (reference(model="other"), Refusal.FOREIGN_MODEL),
        (reference(layout="other"), Refusal.FOREIGN_LAYOUT),
        (reference(content="other"), Refusal.FOREIGN_CONTENT),
        (reference(claim_port=1), Refusal.TAMPERED),
        (reference(claim_host="10.0.0.2"), Refusal.TAMPERED),
        (reference(tokens=15), Refusal.TRUNCATED),
        (reference(tokens=17), Refusal.WRONG_SHAPE),
        (reference(producer="e" * 20_000), Refusal.MALFORMED),
        (pending(identifier="j"), Refusal.FOREIGN_CONTENT),
        (pending(candidates=()), Refusal.MALFORMED),
        (pending(candidates=(PLACE,) * 17), Refusal.MALFORMED),
        (pending(candidates=(Where("e", "x", "h", 0),)), Refusal.MALFORMED),
        (pending(candidates=(Where("e", "x", "", 1),)), Refusal.MALFORMED),
        (pending(wait_s=0.0), Refusal.MALFORMED),
        (pending(wait_s=float("nan")), Refusal.MALFORMED),
        (pending(wait_s=float("inf")), Refusal.MALFORMED),
    ],
)
def test_what_cannot_be_used_is_refused(entry: Any, refusal: Refusal) -> None:
    assert view().source({"i": entry}, "i", 16) is refusal


@pytest.mark.parametrize("entry", [reference(), pending(), reference(b"other"), pending(b"other")])
def test_with_a_key_only_what_is_signed_is_looked_at(entry: dict[str, Any]) -> None:
    assert view(KEY).source({"i": entry}, "i", 16) is Refusal.BAD_SIGNATURE


def test_a_signature_covers_every_field() -> None:
    signed = reference(KEY)["suite"]
    for name in signed:
        changed = signed[name] + ("x" if isinstance(signed[name], str) else 1)
        answer = view(KEY).source({"i": {"suite": signed | {name: changed}}}, "i", 16)
        assert answer in (Refusal.BAD_SIGNATURE, Refusal.MALFORMED), name


@pytest.mark.parametrize("name", ["", "x" * 1025, "a\nb", "a\x00", "\ud800"])
def test_names_that_do_not_travel(name: str) -> None:
    assert not usable(name)
    assert view().source({name: reference()}, name, 16) is Refusal.MALFORMED


@pytest.mark.parametrize("name", ["a", "../evil", "ü", "a b", "x" * 1024])
def test_names_that_travel(name: str) -> None:
    assert usable(name)


@pytest.mark.parametrize(
    ("grid", "sound"),
    [
        (torch.tensor([1, 8, 8]), True),
        (torch.tensor([1.0, 8.0, 8.0]), False),
        (torch.tensor([8, 8]), False),
        (torch.tensor([[1, 8, 8]]), False),
        (torch.tensor([1, 0, 8]), False),
        (torch.tensor([1, -8, 8]), False),
        (None, True),
    ],
)
def test_numbers_that_size_a_placeholder(grid: torch.Tensor | None, sound: bool) -> None:
    data = {"image_grid_thw": SimpleNamespace(data=grid), "image_embeds": SimpleNamespace(data=torch.zeros(2))}
    assert sound_metadata(SimpleNamespace(data=data)) is sound
    assert sound_metadata(SimpleNamespace(data=None))
