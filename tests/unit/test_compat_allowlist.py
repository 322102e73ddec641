"""VLLM_PLUGINS: ours is named, and everybody else's plugins are loaded or not as before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_suite.compat.allowlist import (
    BOOTSTRAP,
    CONTROL,
    DEFAULT_GROUPS,
    ENDPOINT_GROUP,
    OPT_IN_BY_NAME,
    discover,
    plan,
)

NAME = st.sampled_from(["a", "b", "c", "d", *OPT_IN_BY_NAME])
FOUND = st.fixed_dictionaries(
    {group: st.lists(NAME, unique=True, max_size=4) for group in (*DEFAULT_GROUPS, ENDPOINT_GROUP)}
)


def loaded(found: dict[str, list[str]], value: str | None) -> set[tuple[str, str]]:
    """vLLM's rule: everything of the default groups, or what is named; endpoint plugins by name only."""
    named = None if value is None else value.split(",")
    default = {(g, n) for g in DEFAULT_GROUPS for n in found[g] if named is None or n in named}
    return default | {(ENDPOINT_GROUP, n) for n in found[ENDPOINT_GROUP] if named is not None and n in named}


def acts(found: dict[str, list[str]], value: str | None) -> set[tuple[str, str]]:
    """Plugins that change anything: an opt-in one does so only where it is named."""
    named = () if value is None else value.split(",")
    return {(g, n) for g, n in loaded(found, value) if n not in OPT_IN_BY_NAME or n in named}


@given(FOUND)
def test_an_unset_list_becomes_one_that_changes_nothing_but_ours(found: dict[str, list[str]]) -> None:
    found[DEFAULT_GROUPS[0]].append(BOOTSTRAP)
    found[ENDPOINT_GROUP].append(CONTROL)
    value = plan(None, found)
    if value is None:
        default = {name for group in DEFAULT_GROUPS for name in found[group]}
        assert default & set(found[ENDPOINT_GROUP])
        return
    assert acts(found, value) == acts(found, None) | {(ENDPOINT_GROUP, CONTROL)}


@given(FOUND, st.lists(NAME, max_size=3).map(",".join))
def test_a_list_of_the_user_grows_by_ours_only(found: dict[str, list[str]], current: str) -> None:
    found[ENDPOINT_GROUP].append(CONTROL)
    value = plan(current, found)
    assert value is not None
    assert loaded(found, value) == loaded(found, current) | {(ENDPOINT_GROUP, CONTROL)}
    assert plan(value, found) == value


def test_a_name_in_two_groups_has_no_list() -> None:
    found = {group: [] for group in DEFAULT_GROUPS} | {DEFAULT_GROUPS[0]: ["x"], ENDPOINT_GROUP: ["x", CONTROL]}
    assert plan(None, found) is None


def test_our_own_entry_points_are_discovered() -> None:
    found = discover()
    assert BOOTSTRAP in found["vllm.general_plugins"]
    assert CONTROL in found[ENDPOINT_GROUP]
