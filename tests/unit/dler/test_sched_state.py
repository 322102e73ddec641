"""What was learned, over a restart."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sched_requests import Clock, of, policy

from vllm_dler.policy import make_policy
from vllm_dler.state import EVERY_S


def learn(one: Any) -> None:
    for _ in range(20):
        ask = of("a", num_output_tokens=30)
        one.arrived(ask, 0)
        one.finished(ask, "stop")


def outcomes(one: Any) -> dict[tuple[str, ...], float]:
    return {tuple(labels): count for labels, count in one.report()["counters"].get("state", [])}


def test_a_restarted_engine_knows_what_the_last_one_learned(tmp_path: Path) -> None:
    path = str(tmp_path / "lengths.json")
    first = policy(state_file=path)
    assert outcomes(first) == {("load", "missing"): 1}
    learn(first)
    first.close()
    assert outcomes(first)["save", "ok"] == 1
    second = policy(state_file=path)
    assert outcomes(second) == {("load", "ok"): 1}
    assert second.arrived(of("a"), 0).predicted == first.arrived(of("a"), 0).predicted == pytest.approx(30, rel=0.2)


def test_it_is_written_from_time_to_time_and_no_step_waits_for_it(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "lengths.json"
    one = policy(clock=clock, state_file=str(path))
    learn(one)
    go, save = threading.Event(), one.lengths.save

    def slow(where: Any) -> Any:
        assert go.wait(10)
        return save(where)

    one.lengths.save = slow  # type: ignore[method-assign]
    one.begin_step()
    assert not path.exists()
    for _ in range(3):  # one writer at a time
        clock.now += EVERY_S
        one.begin_step()
    assert not path.exists()
    go.set()
    one.close()
    assert path.exists()
    assert outcomes(one)["save", "ok"] == 2


def test_a_file_that_cannot_be_used_is_said_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "torn.json"
    path.write_text('{"format": "vllm-')
    with caplog.at_level(logging.WARNING, "vllm.suite"):
        one = policy(state_file=str(path))
        policy(state_file=str(tmp_path / "no" / "such" / "folder")).close()
    assert outcomes(one) == {("load", "failed"): 1}
    assert [text for text in ("learned anew", "not kept") if text in caplog.text] == ["learned anew", "not kept"]


def test_engines_side_by_side_have_a_file_each(tmp_path: Path) -> None:
    path = str(tmp_path / "lengths.json")
    for size, index, name in ((1, 0, "lengths.json"), (2, 0, "lengths.json.0"), (2, 1, "lengths.json.1")):
        config = SimpleNamespace(
            additional_config={"suite": {"dler": {"state_file": path}}},
            parallel_config=SimpleNamespace(data_parallel_size=size, data_parallel_index=index),
            scheduler_config=SimpleNamespace(policy="fcfs"),
            model_config=SimpleNamespace(max_model_len=1000),
        )
        make_policy(config).close()
        assert (tmp_path / name).exists()


def test_nothing_is_kept_where_nobody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    clock = Clock()
    one = policy(clock=clock)
    clock.now += 10 * EVERY_S
    one.begin_step()
    one.close()
    assert not list(tmp_path.iterdir())
    assert not outcomes(one)
