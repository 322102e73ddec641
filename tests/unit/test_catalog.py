"""Names, selections and the texts a person gets for a wrong one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_suite.catalog import (
    PLUGINS,
    NotLanded,
    PluginInfo,
    SelectionError,
    UnknownPlugin,
    landed_names,
    parse_selection,
)

WORD = st.text(alphabet="abcdefghijklmnopqrstuvwxyz_-", min_size=1, max_size=12)


def test_the_four_plugins_are_in_the_catalog() -> None:
    assert list(PLUGINS) == ["disagg", "epd", "swiftkv", "dler"]
    assert "disagg" in landed_names()


@pytest.mark.parametrize("text", ["", " ", ",", " , ,"])
def test_nothing_selects_nothing(text: str) -> None:
    assert parse_selection(text) == ()


@given(st.lists(st.tuples(st.sampled_from(landed_names()), st.sampled_from(["", " ", "\t"])), max_size=6))
def test_order_spaces_and_repeats(parts: list[tuple[str, str]]) -> None:
    text = ",".join(f"{space}{name}{space}" for name, space in parts)
    assert parse_selection(text) == tuple(dict.fromkeys(name for name, _ in parts))


@given(WORD.filter(lambda word: word not in PLUGINS))
def test_an_unknown_name_gets_the_list_of_known_ones(word: str) -> None:
    with pytest.raises(UnknownPlugin) as caught:
        parse_selection(f"disagg,{word}")
    assert repr(word) in str(caught.value)
    assert all(name in str(caught.value) for name in PLUGINS)


def test_a_plugin_that_has_not_landed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLUGINS, "later", PluginInfo("later", "vllm_later", "not written yet"))
    with pytest.raises(NotLanded, match="has not landed") as caught:
        parse_selection("later")
    assert "disagg" in str(caught.value)
    assert isinstance(caught.value, SelectionError)
