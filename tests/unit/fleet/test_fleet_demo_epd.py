"""The encoder demo's workload, its second router, and what its report calls a success."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_suite.fleet.demo_epd_report import Counts, Phase, make_report, print_report
from vllm_suite.fleet.demo_epd_spec import EpdOptions, epd_fleet, router_over, workload
from vllm_suite.fleet.demo_pictures import pictures_of
from vllm_suite.fleet.launch import plan_instances
from vllm_suite.fleet.replay import Answer
from vllm_suite.fleet.scrape import parse
from vllm_suite.router.config import RouterConfig


def urls(requests: Any) -> list[str]:
    parts = [part for request in requests for part in request.body["messages"][0]["content"]]
    return [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]


def test_the_second_phase_shows_pictures_of_the_first_only() -> None:
    work = workload(EpdOptions(seed=3))
    assert set(urls(work.repeated)) <= set(urls(work.mixed))
    assert len(set(urls(work.mixed))) == 8
    assert pictures_of(work.repeated) == len(urls(work.repeated)) > 8
    assert not set(urls([work.timed])) & set(urls(work.mixed))
    indices = [request.index for request in (*work.mixed, *work.repeated)]
    assert indices == list(range(len(indices)))
    assert work == workload(EpdOptions(seed=3))


def test_a_round_differs_by_its_salt_alone() -> None:
    work = workload(EpdOptions(pictures=2))
    first, second = work.round(5, "a"), work.round(5, "b")
    assert first.index == 5
    assert {key for key in first.body if first.body[key] != second.body[key]} == {"cache_salt"}


def test_a_second_router_knows_some_of_the_instances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    fleet = epd_fleet(EpdOptions(folder=tmp_path), "m")
    instances = plan_instances(fleet)
    assert [one.role for one in instances] == ["encode", "encode", "prefill", "decode"]
    spec, router = router_over(fleet, [instances[i] for i in (0, 2, 3)], "one", fleet.router.port + 1)
    path = Path(router.argv[-1])
    assert path.parent == spec.local.log_dir != fleet.local.log_dir
    config = RouterConfig.model_validate(yaml.safe_load(path.read_text()))
    assert [target.url for target in config.membership.static] == [instances[i].url for i in (0, 2, 3)]
    assert config.port not in {port for port, _ in fleet.ports()}
    assert config.encode == fleet.router.encode


ANSWERS = [Answer(0, 9, (1, 2), 5.0, 1.0), Answer(1, 9, (3, 4), 7.0, 1.0)]
GOOD = Counts(
    encoded={"e0": 2.0, "e1": 2.0}, fetches=4, fetched_bytes=400, kv_bytes=10, stage_seconds=0.2, stage_count=2
)


def phases(change: Callable[[dict[str, Counts]], None] = lambda counts: None) -> list[Phase]:
    counts = {
        "mixed": GOOD,
        "repeated": dataclasses.replace(GOOD, encoded={"e0": 0.0, "e1": 0.0}),
        "one encoder": dataclasses.replace(GOOD, encoded={"e0": 4.0, "e1": 0.0}),
        "two encoders": dataclasses.replace(GOOD, stage_seconds=0.1),
    }
    change(counts)
    return [Phase(name, 2, ANSWERS, 4, found) for name, found in counts.items()]


def report(found: list[Phase], expected: list[Answer] = ANSWERS) -> dict[str, Any]:
    return make_report(found, {answer.index: answer for answer in expected}, {})


def test_a_good_report() -> None:
    good = report(phases())
    assert good["ok"], good["failures"]
    assert (good["identical"], good["requests"]) == (8, 8)
    assert good["cache_hits"] == 4
    assert good["bytes_moved"] == 1600
    assert good["encode_ms"] == {"one_encoder": 100.0, "two_encoders": 50.0, "speedup": 2.0}
    json.dumps(good)
    out = io.StringIO()
    print_report(good, out)
    assert "8 of 8 answers identical" in out.getvalue()
    assert "2.00 times as fast" in out.getvalue()


@pytest.mark.parametrize(
    ("phase", "counts", "says"),
    [
        ("mixed", {"local": {"missing": 1.0}}, "pictures were encoded where they were not to be"),
        ("mixed", {"fetched_bytes": 0.0}, "no encoder output moved"),
        ("repeated", {"encoded": {"e0": 1.0}}, "a repeated picture was encoded again"),
        ("one encoder", {"encoded": {"e0": 2.0, "e1": 2.0}}, "the wrong encoders ran"),
        ("two encoders", {"encoded": {"e0": 4.0, "e1": 0.0}}, "the wrong encoders ran"),
    ],
)
def test_what_is_not_as_claimed_is_said(phase: str, counts: dict[str, Any], says: str) -> None:
    def change(found: dict[str, Counts]) -> None:
        found[phase] = dataclasses.replace(found[phase], **counts)

    bad = report(phases(change))
    assert not bad["ok"]
    assert bad["failures"] == [says]
    out = io.StringIO()
    print_report(bad, out)
    assert f"NOT as claimed: {says}" in out.getvalue()


def test_no_kv_and_wrong_tokens_are_failures() -> None:
    def still(found: dict[str, Counts]) -> None:
        found.update({name: dataclasses.replace(one, kv_bytes=0.0) for name, one in found.items()})

    assert report(phases(still))["failures"] == ["no KV moved"]
    other = report(phases(), [ANSWERS[0], dataclasses.replace(ANSWERS[1], token_ids=(3, 5))])
    assert other["failures"] == ["outputs differ"]
    assert other["mismatched"] == 4
    out = io.StringIO()
    print_report(other, out)
    assert "request 1: differs from output token 1 on" in out.getvalue()


def test_counts_are_read_and_subtracted() -> None:
    encoder = parse('vllm_suite_ec_encoded_items_total{engine="0"} 5\n')
    prefill = parse(
        'vllm_suite_ec_fetches_total{outcome="ok"} 4\nvllm_suite_ec_fetches_total{outcome="failed"} 9\n'
        'vllm_suite_ec_fetch_bytes_total{peer="e"} 640\nvllm_suite_ec_local_encodes_total{reason="expired"} 1\n'
    )
    router = parse(
        "vllm_suite_router_encode_request_seconds_sum 1.5\nvllm_suite_router_encode_request_seconds_count 3\n"
    )
    found = Counts.read({"e0": encoder}, [prefill], [router])
    assert found == Counts(
        encoded={"e0": 5}, fetches=4, fetched_bytes=640, local={"expired": 1}, stage_seconds=1.5, stage_count=3
    )
    nothing = found.since(found)
    assert not any(nothing.encoded.values())
    assert not nothing.local
    assert nothing.fetched_bytes == 0
    assert Counts.sum([found, found]).encoded == {"e0": 10}
    assert Counts.sum([found, found]).fetched_bytes == 1280
