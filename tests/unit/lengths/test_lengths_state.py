"""State: what is saved answers as before, what is torn or foreign is refused whole, merging adds."""

from __future__ import annotations

import json
import os
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_suite.lengths import LengthSettings, OnlineLengths, StateError

KEYS = ["class:a", "class:b", "lora:x"]
ASKED = [([], 0), (["class:a"], 0), (["class:b"], 700), (["lora:x", "class:b"], 5000), (["none"], 30_000)]

histories = st.lists(
    st.tuples(st.lists(st.sampled_from(KEYS), max_size=3, unique=True), st.integers(0, 40_000), st.booleans()),
    max_size=50,
)
SETTINGS = LengthSettings(half_life_s=20, min_observations=1, half_life_observations=100)
UNFADING = LengthSettings(half_life_observations=None, min_observations=1)


def learned(history, settings=SETTINGS, offset=0.0) -> OnlineLengths:
    made = OnlineLengths(settings)
    for index, (keys, tokens, censored) in enumerate(history):
        made.observe(keys, tokens, censored=censored, now=offset + index)
    return made


def means(made: OnlineLengths) -> list[float]:
    """-1 for None."""
    found = [made.remaining(keys, age, 32_768) for keys, age in ASKED]
    return [-1.0 if answer is None else answer for answer in found]


def answers(made: OnlineLengths) -> list[float]:
    """Quantiles too. They are whole numbers, which the last bit of a weight can change."""
    found = [made.quantile(keys, 0.9, age, 32_768) for keys, age in ASKED]
    return means(made) + [-1.0 if answer is None else answer for answer in found]


@given(histories)
def test_plain_data_gives_the_same_answers(history):
    made = learned(history)
    answers(made)
    again = OnlineLengths.from_dict(json.loads(json.dumps(made.to_dict())), SETTINGS)
    assert answers(again) == answers(made)
    assert again.to_dict() == made.to_dict()
    made.observe(["class:a"], 77, now=1000.0)
    again.observe(["class:a"], 77, now=1000.0)
    assert answers(again) == pytest.approx(answers(made))


def test_a_file_survives_a_restart(tmp_path: Path):
    made = learned([(["class:a"], tokens, tokens % 3 == 0) for tokens in range(10, 4000, 37)])
    path = tmp_path / "lengths.json"
    assert made.save(path) == ("ok", "")
    again = OnlineLengths(SETTINGS)
    assert again.load(path) == ("ok", "")
    assert answers(again) == answers(made)
    assert list(tmp_path.iterdir()) == [path]
    assert again.save(path).outcome == "ok"  # in place of the old one
    assert list(tmp_path.iterdir()) == [path]


def test_the_newest_keys_are_taken_over_where_fewer_are_allowed(tmp_path: Path):
    made = learned([([f"k{number}"], 5, False) for number in range(20)])
    again = OnlineLengths.from_dict(made.to_dict(), LengthSettings(max_keys=3, min_observations=1))
    assert len(again) == 3
    assert again.level(["k19"]) == 0
    assert again.level(["k16"]) == 1


def test_a_file_that_cannot_be_read_or_written_is_reported(tmp_path: Path):
    made = learned([(["class:a"], 5, False)])
    before = made.to_dict()
    found = made.load(tmp_path / "none.json")
    assert found.outcome == "missing"
    assert "none.json" in found.reason
    assert made.load(tmp_path).outcome == "failed"
    found = made.save(tmp_path / "no_folder" / "lengths.json")
    assert found.outcome == "failed"
    assert "no_folder" in found.reason
    assert made.to_dict() == before


def test_a_save_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "lengths.json"
    learned([(["class:a"], 5, False)]).save(path)
    old = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    found = learned([(["class:a"], 9, False)]).save(path)
    assert found.outcome == "failed"
    assert "No space left" in found.reason
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_torn_file_is_refused(tmp_path: Path, share: float):
    path = tmp_path / "lengths.json"
    learned([(["class:a"], tokens, False) for tokens in range(50)]).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    made = learned([(["class:b"], 5, False)])
    before = answers(made)
    found = made.load(path)
    assert found.outcome == "failed"
    assert "torn" in found.reason
    assert answers(made) == before


def edited(change) -> dict:
    data = deepcopy(learned([(["class:a"], 100, False), (["class:a"], 300, True)]).to_dict())
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.update(format="other"), "format is 'other'"),
        (lambda data: data.update(version=2), "version 2"),
        (lambda data: data.pop("all"), "all"),
        (lambda data: data.update(extra=1), "extra"),
        (lambda data: data["keys"].update(x=3), "keys"),
        (lambda data: data["all"].update(bins=[1, 2.5]), "bins"),
        (lambda data: data["all"].update(bins=[90, 70]), "out of order"),
        (lambda data: data["all"].update(bins=[1, 9999]), "bins"),
        (lambda data: data["all"].update(exact=[1.0]), "different lengths"),
        (lambda data: data["all"].update(exact=[-1.0, 0.0]), "weight -1.0"),
        (lambda data: data["all"].update(exact=[float("inf"), 0.0]), "weight inf"),
        (lambda data: data["all"].update(exact_sums=[5000.0, 0.0]), "5000.0 tokens"),
        (lambda data: data["all"].update(censored_sums=[7.0, 300.0]), "7.0 tokens"),
        (lambda data: data["all"].update(count=-1), "count"),
        (lambda data: data["all"].update(last=float("nan")), "no number"),
        (lambda data: data["all"].update(unit=0.0), "unit of 0"),
        (lambda data: data["keys"]["class:a"].update(exact=[]), "key 'class:a'"),
    ],
)
def test_a_foreign_or_damaged_state_is_refused_by_name(change, words):
    with pytest.raises(StateError, match=words):
        OnlineLengths.from_dict(edited(change))


@pytest.mark.parametrize("raw", [None, [], "text", 3, {}])
def test_anything_else_is_no_state(raw):
    with pytest.raises(StateError, match="not a state"):
        OnlineLengths.from_dict(raw)


def merged(*models: OnlineLengths) -> OnlineLengths:
    made = OnlineLengths.from_dict(models[0].to_dict(), models[0].settings)
    for other in models[1:]:
        made.merge(other)
    return made


@given(histories, histories)
def test_merging_two_is_like_having_seen_both(one, two):
    """Without fading; the order of the histories then says nothing."""
    both = learned([*one, *two], UNFADING)
    assert means(merged(learned(one, UNFADING), learned(two, UNFADING))) == pytest.approx(means(both))


@given(histories, histories, histories, st.floats(-50, 50))
def test_merging_does_not_mind_the_order(one, two, three, offset):
    models = [learned(one), learned(two, offset=offset), learned(three, offset=-offset)]
    first = means(merged(*models))
    assert means(merged(models[1], models[2], models[0])) == pytest.approx(first, rel=1e-6)
    models[1].merge(models[2])
    assert means(merged(models[0], models[1])) == pytest.approx(first, rel=1e-6)


def test_what_the_other_saw_earlier_weighs_less():
    settings = LengthSettings(half_life_observations=None, half_life_s=10, shrinkage=0)
    one, two = OnlineLengths(settings), OnlineLengths(settings)
    one.observe(["a"], 100, now=0.0)
    two.observe(["a"], 400, now=10.0)
    for made in (merged(one, two), merged(two, one)):
        assert made.remaining(["a"], 0, 4000) == pytest.approx((0.5 * 100 + 400) / 1.5)


def test_merging_leaves_the_other_as_it_was():
    one, two = learned([(["class:a"], 5, False)]), learned([(["class:a"], 9, False)])
    before = two.to_dict()
    one.merge(two)
    one.observe(["class:a"], 11)
    assert two.to_dict() == before


def test_merging_keeps_the_keys_that_were_observed_last():
    few = LengthSettings(max_keys=2, min_observations=1)
    one, two = OnlineLengths(few), OnlineLengths(few)
    one.observe(["old"], 5, now=1.0)
    one.observe(["new"], 5, now=4.0)
    two.observe(["older"], 5, now=0.0)
    two.observe(["newer"], 5, now=5.0)
    for made in (merged(one, two), merged(two, one)):
        assert len(made) == 2
        assert [made.level([key]) for key in ("new", "newer", "old", "older")] == [0, 0, 1, 1]


def test_a_state_merges_with_itself():
    settings = LengthSettings(half_life_observations=None, shrinkage=0)
    made = learned([(["class:a"], 5, False), (["class:a"], 50, False)], settings)
    before = answers(made)
    made.merge(made)
    assert answers(made) == pytest.approx(before)
    assert made.to_dict()["all"]["count"] == 4
