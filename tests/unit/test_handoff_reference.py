"""Reading references that come from outside."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.disagg.test_leases import reference
from vllm_suite.encoded import Pending
from vllm_suite.handoff import Handoff, Refusal, digest, parse

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)


def test_round_trip() -> None:
    ref = reference()
    assert parse(ref.to_json()) == ref


@given(JSON)
def test_anything_else_is_refused_without_raising(raw: Any) -> None:
    assert parse(raw) in (Refusal.UNFENCED, Refusal.MALFORMED)


@given(st.sampled_from(Handoff.__struct_fields__), JSON)
def test_a_field_of_another_type_is_malformed(name: str, value: Any) -> None:
    fields = reference().to_json()
    if type(value) is type(fields[name]) or (isinstance(fields[name], float) and isinstance(value, int)):
        return
    assert parse({**fields, name: value}) is Refusal.MALFORMED


@given(st.sampled_from([f for f in Handoff.__struct_fields__ if f != "mac"]), st.binary(min_size=1, max_size=32))
def test_the_signature_covers_every_field(name: str, key: bytes) -> None:
    signed = reference().signed(key)
    assert signed.check_signature(key) is None
    value = getattr(signed, name)
    fields = {f: getattr(signed, f) for f in Handoff.__struct_fields__}
    fields[name] = value + 1 if isinstance(value, int | float) else value + "x"
    assert Handoff(**fields).check_signature(key) is Refusal.BAD_SIGNATURE
    assert signed.check_signature(key + b"x") is Refusal.BAD_SIGNATURE
    assert reference().check_signature(key) is Refusal.BAD_SIGNATURE
    assert signed.check_signature(None) is None


@given(st.text(max_size=70))
def test_no_signature_is_more_than_wrong(mac: str) -> None:
    """The engine looks at it: an exception there would end the engine."""
    fields = {**reference().to_json(), "mac": mac}
    assert Handoff(**fields).check_signature(b"key") is Refusal.BAD_SIGNATURE
    assert not Pending(identifier="i", candidates=(), wait_s=1.0, mac=mac).right_signature(b"key")


@pytest.mark.parametrize("name", ["producer", "epoch", "request_id", "content", "claim_host", "mac"])
def test_half_a_surrogate_pair_is_malformed(name: str) -> None:
    """As JSON for Python may hold it, where the engine is in the process that read the request."""
    assert parse({**reference().to_json(), name: "\ud800"}) is Refusal.MALFORMED


@given(st.lists(st.text(max_size=5), max_size=4), st.lists(st.text(max_size=5), max_size=4))
def test_digests_of_different_parts_differ(a: list[str], b: list[str]) -> None:
    assert (digest(*a) == digest(*b)) == (a == b)
