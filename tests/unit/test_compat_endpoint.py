"""Keys of the control routes."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_suite.compat.endpoint import _not_a_poll, authorized, control_keys
from vllm_suite.compat.engine_state import answer_deadline_s


def args(*keys: str) -> SimpleNamespace:
    return SimpleNamespace(api_key=list(keys) or None)


def test_which_key_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_SUITE_CONTROL_KEY", raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert control_keys(args()) == ()
    assert authorized(None, ())
    monkeypatch.setenv("VLLM_API_KEY", "from-env")
    assert authorized("Bearer from-env", control_keys(args()))
    assert not authorized("Bearer from-env", control_keys(args("a", "b")))
    assert authorized("bearer b", control_keys(args("a", "b")))
    monkeypatch.setenv("VLLM_SUITE_CONTROL_KEY", "control")
    assert not authorized("Bearer a", control_keys(args("a")))
    assert authorized("Bearer control", control_keys(args("a")))


@given(st.text(max_size=8), st.text(min_size=1, max_size=8), st.sampled_from(["Bearer", "Basic", ""]))
def test_only_the_key_itself_opens(offered: str, key: str, scheme: str) -> None:
    keys = control_keys(args(key))
    assert authorized(f"{scheme} {offered}", keys) is (offered == key and scheme == "Bearer")
    assert not authorized(None, keys)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_a_deadline_is_a_positive_number(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SUITE_ENGINE_DEADLINE_S", text)
    with pytest.raises(ValueError, match="VLLM_SUITE_ENGINE_DEADLINE_S must be"):
        answer_deadline_s()


@pytest.mark.parametrize(
    ("path", "status", "kept"),
    [("/suite/v1/state", 200, False), ("/suite/v1/state", 401, True), ("/v1/models", 200, True)],
)
def test_only_answered_polls_are_left_out_of_the_access_log(path: str, status: int, kept: bool) -> None:
    access = ("127.0.0.1:1", "GET", path, "1.1", status)
    record = logging.LogRecord("uvicorn.access", logging.INFO, "", 0, '%s - "%s %s HTTP/%s" %d', access, None)
    assert _not_a_poll(record) is kept
