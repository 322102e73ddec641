"""What a request says about an item in slices, checked before anybody is asked."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.unit.epd.test_sources import KEY, PLACE, PRODUCER, view
from vllm_epd.sources import Source
from vllm_suite.encoded import MAX_SLICES, Pending, slice_identifier
from vllm_suite.handoff import Refusal

ROWS = (7, 5, 4)


def made(
    index: int, count: int = 3, rows: int | None = None, of: str = "i", key: bytes | None = None
) -> dict[str, Any]:
    name = slice_identifier(of, index, count)
    ref = PRODUCER.reference(name, f"item-{index}", ROWS[index % 3] if rows is None else rows, 30.0, key)
    return {"suite": ref.to_json()}


def coming(index: int, count: int = 3, of: str = "i", wait_s: float = 5.0, key: bytes | None = None) -> dict[str, Any]:
    pending = Pending(identifier=slice_identifier(of, index, count), candidates=(PLACE,), wait_s=wait_s).signed(key)
    return {"suite_pending": msgspec.to_builtins(pending)}


def ask(*entries: Any, rows: int = 16, key: bytes | None = None) -> Source | Refusal | None:
    return view(key).source({"i": {"suite_slices": list(entries)}}, "i", rows)


@pytest.mark.parametrize("key", [None, KEY])
def test_slices_in_order(key: bytes | None) -> None:
    source = ask(*(made(index, key=key) for index in range(3)), key=key)
    assert isinstance(source, Source)
    assert (source.ref, source.pending, source.wait_s) == (None, None, None)
    assert [one.identifier for one in source.slices] == [slice_identifier("i", index, 3) for index in range(3)]
    assert [one.ref.tokens for one in source.slices if one.ref is not None] == list(ROWS)
    source = ask(made(0, key=key), coming(1, key=key), coming(2, wait_s=9.0, key=key), key=key)
    assert isinstance(source, Source)
    assert source.wait_s == 9.0
    assert [one.pending is None for one in source.slices] == [True, False, False]


def test_the_most_slices_fit_into_a_source() -> None:
    entries = [made(index, MAX_SLICES, rows=1) for index in range(MAX_SLICES)]
    assert isinstance(ask(*entries, rows=MAX_SLICES), Source)
    entries = [coming(index, MAX_SLICES) for index in range(MAX_SLICES)]
    assert isinstance(ask(*entries, rows=MAX_SLICES), Source)


def test_equal_slices_have_equal_keys() -> None:
    keys = []
    for entries in ((made(0), made(1), made(2)), (made(0), made(1), made(2)), (made(0), coming(1), made(2))):
        source = ask(*entries)
        assert isinstance(source, Source)
        keys.append(source.key)
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("entries", "refusal"),
    [
        ((), Refusal.MALFORMED),
        ((made(0, 1),), Refusal.MALFORMED),
        (tuple(made(index, MAX_SLICES + 1, rows=1) for index in range(MAX_SLICES + 1)), Refusal.MALFORMED),
        ((made(0), 7, made(2)), Refusal.MALFORMED),
        ((made(0), {}, made(2)), Refusal.UNFENCED),
        ((made(0), {"suite_error": "non_finite"}, made(2)), Refusal.NON_FINITE),
        ((made(0), {"suite_slices": [made(0), made(1)]}, made(2)), Refusal.UNFENCED),
        ((made(1), made(0), made(2)), Refusal.FOREIGN_CONTENT),
        ((made(0), made(0), made(2)), Refusal.FOREIGN_CONTENT),
        ((made(0), made(1)), Refusal.FOREIGN_CONTENT),  # two of three
        ((made(0), made(1, of="j"), made(2)), Refusal.FOREIGN_CONTENT),
        ((made(0), coming(2), coming(1)), Refusal.FOREIGN_CONTENT),
        ((made(0), made(1), made(2, rows=3)), Refusal.TRUNCATED),
        ((made(0), made(1), made(2, rows=5)), Refusal.WRONG_SHAPE),
        ((made(0, rows=12), made(1), made(2, rows=-1)), Refusal.MALFORMED),
        ((made(0, rows=12), made(1, rows=4), made(2, rows=0)), Refusal.WRONG_SHAPE),
        ((made(0, rows=15), coming(1), coming(2)), Refusal.WRONG_SHAPE),  # nothing is left for the others
    ],
)
def test_what_cannot_be_used_is_refused(entries: tuple[Any, ...], refusal: Refusal) -> None:
    assert ask(*entries) is refusal


@pytest.mark.parametrize("bad", [made(1), coming(1), made(1, key=b"other"), coming(1, key=b"other")])
def test_every_slice_must_be_signed(bad: dict[str, Any]) -> None:
    assert ask(made(0, key=KEY), bad, made(2, key=KEY), key=KEY) is Refusal.BAD_SIGNATURE


def test_another_model_s_slice() -> None:
    entry = made(1)
    entry["suite"]["model"] = "other"
    assert ask(made(0), entry, made(2)) is Refusal.FOREIGN_MODEL
