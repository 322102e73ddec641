"""Trace formats, arrivals at a rate, and synthetic workloads."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_suite.planner.models import load as load_model
from vllm_suite.planner.traces import TraceError, Workload, item_of, load
from vllm_suite.planner.workload import Request

DATA = Path(os.environ.get("VLLM_SUITE_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data")

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
AZURE_2023 = AZURE + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
AZURE_2024 = AZURE + "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01+00:00,2399,6\n"
MOONCAKE = (
    '{"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]}\n'
    '{"timestamp": 3500, "input_length": 600, "output_length": 6, "hash_ids": [7, 10]}\n'
)
APEX = (
    '{"RequestID": "a", "StartTimeOffset": 618518284, "ContextTokens": 304, "GeneratedTokens": 822}\n'
    '{"RequestID": "b", "StartTimeOffset": 1618518284, "ContextTokens": 497, "GeneratedTokens": 1783}\n'
)
SERVINGSIM = (
    '{"request_id": "bench-0", "input_toks": 2361, "output_toks": 532, "arrival_time": 1777142984.5}\n'
    '{"request_id": "bench-1", "input_toks": 1128, "output_toks": 772, "arrival_time": 1777142985.75}\n'
)
BENCH: dict[str, Any] = {
    "backend": "vllm", "request_rate": 5.0, "max_concurrency": None, "request_throughput": 4.9,
    "input_lens": [10, 20, 30], "output_lens": [1, 0, 3], "start_times": [100.0, 100.25, 101.0],
    "errors": ["", "Timeout", ""],
}  # fmt: skip


def guidellm(strategy: str, starts: list[float], *, old: bool = False) -> dict[str, Any]:
    entries: list[dict[str, Any]] = [
        {"prompt_tokens": 100 + index, "output_tokens": 7, **({"start_time": start} if old else
         {"request_start_time": start + 0.5, "info": {"timings": {"targeted_start": start}}})}
        for index, start in enumerate(starts)
    ]  # fmt: skip
    return {
        "args" if old else "config": {"strategy": {"type_": strategy}},
        "requests": {"successful": entries, "incomplete": [{}], "errored": []},
    }


def write(folder: Path, text: str, name: str = "trace", pack: bool = False) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if pack else text.encode())
    return path


def short(requests: Any) -> list[tuple[float, int, int]]:
    return [(round(each.arrival, 6), each.prompt, each.output) for each in requests]


@pytest.mark.parametrize("pack", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (AZURE_2023, [(0.0, 374, 44), (4.314579, 396, 109)]),
        (AZURE_2024, [(0.0, 2162, 5), (0.99007, 2399, 6)]),
        (MOONCAKE, [(0.0, 1100, 5), (2.5, 600, 6)]),
        (APEX, [(0.0, 304, 822), (1.0, 497, 1783)]),
        (SERVINGSIM, [(0.0, 2361, 532), (1.25, 1128, 772)]),
        ("arrival_s,client,input_tokens,output_tokens\n0.5,a,9,8\n2.5,b,7,6\n", [(0.0, 9, 8), (2.0, 7, 6)]),
        (json.dumps(BENCH), [(0.0, 10, 1), (1.0, 30, 3)]),
        (json.dumps({"benchmarks": [guidellm("poisson", [50.0, 53.0])]}), [(0.0, 100, 7), (3.0, 101, 7)]),
        (json.dumps({"benchmarks": [guidellm("constant", [5.0, 7.0], old=True)]}, indent=1),
         [(0.0, 100, 7), (2.0, 101, 7)]),
    ],
    ids=["azure-2023", "azure-2024", "mooncake", "apex", "servingsim", "csv", "vllm-bench", "guidellm", "guidellm-0.2"],
)  # fmt: skip
def test_formats_are_told_from_their_content(tmp_path: Path, text: str, expected: Any, pack: bool) -> None:
    workload = load(write(tmp_path, text, pack=pack))
    assert short(workload.requests()) == expected
    assert workload.recorded
    assert workload.rate == pytest.approx(1 / expected[-1][0], rel=1e-5)
    assert workload.mean_prompt == sum(row[1] for row in expected) / 2


def test_shared_prefixes_are_kept(tmp_path: Path) -> None:
    first, second = load(write(tmp_path, MOONCAKE)).requests()
    assert (first.prefix, second.prefix, first.block) == ((7, 8, 9), (7, 10), 512)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (AZURE_2023 + "2023-11-16 18:15:52.0,x,5\n", 4, "ContextTokens"),
        (AZURE_2023 + "yesterday,3,5\n", 4, "TIMESTAMP"),
        (AZURE_2023 + "2023-11-16 18:15:52.0,3\n", 4, "3 columns"),
        (MOONCAKE + '{"timestamp": 1, "input_length": 3}\n', 3, "output_length"),
        (MOONCAKE + "{]\n", 3, "not JSON"),
        (APEX + '{"StartTimeOffset": null, "ContextTokens": 3, "GeneratedTokens": 3}\n', 3, "StartTimeOffset"),
        (SERVINGSIM + '{"arrival_time": 1, "input_toks": 0, "output_toks": 3}\n', 3, "input_toks"),
        ("input_tokens,output_tokens\n3,4\n5,six\n", 3, "output_tokens"),
        ("prompt,answer\n3,4\n", 1, "no column"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, text: str, line: int, reason: str) -> None:
    with pytest.raises(TraceError, match=rf"trace:{line}: .*{reason}"):
        load(write(tmp_path, text))


def test_files_that_are_no_trace(tmp_path: Path) -> None:
    for text, reason in (
        ("", "no request"),
        (AZURE, "no request"),
        ('{"a": 1}\n', "no known format"),
        (json.dumps({"request_throughput": 3.0}), "--save-detailed"),
        (json.dumps({"benchmarks": [{"requests": None}]}), "requests.successful"),
    ):
        with pytest.raises(TraceError, match=reason):
            load(write(tmp_path, text))
    with pytest.raises(TraceError, match="No such file"):
        load(tmp_path / "absent")
    with pytest.raises(TraceError, match="no format"):
        load(write(tmp_path, APEX), "parquet")


def test_an_output_of_no_token_counts_as_one_and_is_said(tmp_path: Path) -> None:
    workload = load(write(tmp_path, AZURE + "2023-11-16 18:15:46,374,0\n2023-11-16 18:15:47,374,9\n"))
    assert [request.output for request in workload.requests()] == [1, 9]
    assert workload.mean_output == 5
    assert workload.notes == ("1 requests without output count as 1 token",)


def test_a_closed_loop_has_lengths_only(tmp_path: Path) -> None:
    for changed in ({"max_concurrency": 8}, {"request_rate": "inf"}):
        workload = load(write(tmp_path, json.dumps(BENCH | changed)))
        assert not workload.recorded
        assert "lengths only" in workload.notes[0]
        with pytest.raises(TraceError, match="rate"):
            next(workload.requests())
    workload = load(write(tmp_path, json.dumps({"benchmarks": [guidellm("concurrent", [1.0, 2.0])]})))
    assert not workload.recorded


def test_of_several_benchmarks_one_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"benchmarks": [guidellm("constant", [1.0, 2.0, 3.0]),
                                                      guidellm("poisson", [9.0, 9.5])]}))  # fmt: skip
    assert load(path).count == 5
    assert not load(path).recorded
    assert short(load(path, part=1).requests()) == [(0.0, 100, 7), (0.5, 101, 7)]
    assert "2 requests that failed" in load(path).notes[-1]
    with pytest.raises(TraceError, match="no benchmark 2"):
        load(path, part=2)


def bursty(tmp_path: Path, count: int = 400) -> Path:
    """Pairs of requests, 0.1 s apart, a pair each 2 s; in the second half each 1 s."""
    rows, now = ["arrival_s,input_tokens,output_tokens"], 0.0
    for index in range(count):
        rows.append(f"{now},{100 + index},{10 + index % 7}")
        now += 0.1 if index % 2 == 0 else (1.9 if index < count // 2 else 0.9)
    return write(tmp_path, "\n".join(rows))


def test_recorded_arrivals_keep_their_pattern_at_another_rate(tmp_path: Path) -> None:
    workload = load(bursty(tmp_path))
    own = np.diff([request.arrival for request in workload.requests()])
    scaled = [request.arrival for request in workload.requests(rate=10.0)]
    assert (len(scaled) - 1) / scaled[-1] == pytest.approx(10.0)
    assert np.diff(scaled) / own == pytest.approx(np.full(len(own), workload.rate / 10.0))  # type: ignore[operator]


def test_a_limit_has_the_rate_asked_for_itself(tmp_path: Path) -> None:
    # The first half is slower than the whole.
    workload = load(bursty(tmp_path))
    some = list(workload.requests(rate=10.0, limit=200))
    assert len(some) == 200
    assert 199 / some[-1].arrival == pytest.approx(10.0)


def test_repetition_is_no_cache_hit(tmp_path: Path) -> None:
    requests = list(load(write(tmp_path, MOONCAKE)).requests(limit=5, repeat=True))
    assert [request.number for request in requests] == list(range(5))
    seen: set[int] = set()
    for pair in (requests[:2], requests[2:4]):
        ids = {one for request in pair for one in request.prefix}
        assert not ids & seen
        seen |= ids
        assert pair[0].prefix[0] == pair[1].prefix[0]
    assert all(later.arrival > earlier.arrival for earlier, later in pairwise(requests))
    # One mean interval between the last and the first.
    assert requests[2].arrival - requests[1].arrival == pytest.approx(2.5)


def test_a_long_trace_is_read_again_instead_of_kept(tmp_path: Path) -> None:
    path = bursty(tmp_path, 20_000)
    kept, streamed = load(path), load(path, kept=100)
    assert short(kept.requests(rate=3.0)) == short(streamed.requests(rate=3.0))
    # Rows of all columns that are in memory.
    assert len(pickle.dumps(streamed)) < 2_000 < len(pickle.dumps(kept))
    path.write_text("arrival_s,input_tokens,output_tokens\n2,1,1\n1,2,2\n3,3,3\n")
    assert short(load(path).requests()) == [(0.0, 2, 2), (1.0, 1, 1), (2.0, 3, 3)]
    with pytest.raises(TraceError, match="not in order"):
        load(path, kept=2)


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    one, other = load(write(tmp_path, APEX, "a")), load(write(tmp_path, APEX, "b", pack=True))
    changed = load(write(tmp_path, APEX.replace("822", "823"), "c"))
    assert one.fingerprint == other.fingerprint != changed.fingerprint
    shifted = load(write(tmp_path, APEX.replace("618518284", "718518284"), "d"))
    assert shifted.fingerprint == one.fingerprint
    prefixed = load(write(tmp_path, MOONCAKE, "e")).fingerprint
    assert prefixed != load(write(tmp_path, MOONCAKE.replace("[7, 10]", "[8, 10]"), "f")).fingerprint


def test_a_workload_goes_to_another_process(tmp_path: Path) -> None:
    for workload in (load(write(tmp_path, MOONCAKE)), Workload.synthetic(50, 5, cv=0.5, rate=2.0)):
        again = pickle.loads(pickle.dumps(workload))  # noqa: S301 - written in this line
        assert list(again.requests(limit=2)) == list(workload.requests(limit=2))


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_drawn_arrivals_have_rate_and_spread(cv: float) -> None:
    gaps = np.diff([each.arrival for each in Workload.synthetic(5, 5, arrival_cv=cv).requests(rate=8.0, limit=60_000)])
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.04, abs=1e-9)


def test_a_short_draw_has_the_rate_asked_for() -> None:
    for seed in range(5):
        arrivals = [each.arrival for each in Workload.synthetic(5, 5).requests(rate=8.0, limit=30, seed=seed)]
        assert (arrivals[0], len(arrivals)) == (0.0, 30)
        assert 29 / arrivals[-1] == pytest.approx(8.0)


def test_synthetic_lengths_have_mean_and_spread() -> None:
    prompts, outputs = Workload.synthetic(500, 200, cv=0.6, output_cv=0.2).lengths(40_000)
    assert (prompts.mean(), prompts.std() / prompts.mean()) == pytest.approx((500, 0.6), rel=0.02)
    assert (outputs.mean(), outputs.std() / outputs.mean()) == pytest.approx((200, 0.2), rel=0.02)
    prompts, outputs = Workload.synthetic(500, 200, cv=2.0, longest=800).lengths(20_000)
    assert (prompts + outputs).max() == 800
    assert outputs.min() >= 1


def test_draws_depend_on_the_seed_alone() -> None:
    workload = Workload.synthetic(500, 200, cv=0.5)

    def draw(seed: int, rate: float = 2.0) -> list[Request]:
        return list(workload.requests(rate=rate, limit=50, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    # Twice the rate is the same requests, twice as close: plans are compared on the same draw.
    assert [2 * each.arrival for each in draw(1, 4.0)] == pytest.approx([each.arrival for each in draw(1)])


def test_items_come_on_top_of_the_text() -> None:
    encoder = load_model("Qwen/Qwen2.5-VL-7B-Instruct").model.encoder
    assert encoder is not None
    picture, film = item_of(encoder, "1280x720"), item_of(encoder, "8x640x480")
    # 1280 x 720 is 46 x 26 squares of 28 pixels, and two marks.
    assert (picture.tokens, picture.pieces) == (46 * 26 + 2, 1)
    assert film.flops > picture.flops > 1e12
    workload = Workload.synthetic(100, 10, items=(picture, picture))
    (request,) = workload.requests(rate=1.0, limit=1)
    assert request.prompt == 100 + 2 * picture.tokens == workload.mean_prompt
    assert request.items == (picture, picture)
    for wrong in ("1280", "0x720", "-3s"):
        with pytest.raises(TraceError, match="WIDTHxHEIGHT"):
            item_of(encoder, wrong)
    with pytest.raises(TraceError, match="no sound"):
        item_of(encoder, "30s")


def test_bad_workloads_are_refused(tmp_path: Path) -> None:
    for wrong in ({"isl": 0, "osl": 5}, {"isl": 5, "osl": 5, "cv": -1.0}, {"isl": 50, "osl": 5, "longest": 50}):
        with pytest.raises(TraceError):
            Workload.synthetic(**wrong)
    endless = Workload.synthetic(5, 5)
    with pytest.raises(TraceError, match="limit"):
        endless.requests(rate=1.0)
    for rate in (0.0, -1.0, float("nan")):
        with pytest.raises(TraceError, match="rate"):
            endless.requests(rate=rate, limit=5)


def test_the_traces_at_hand() -> None:
    path = DATA / "traces" / "AzureLLMInferenceTrace_2023_conv.csv"
    if not path.is_file():
        pytest.skip(f"no {path}; set VLLM_SUITE_DATA")
    workload = load(path)
    # Published with the trace: 19,366 requests, means of 1,155 and 211 tokens.
    assert (workload.count, round(workload.mean_prompt), round(workload.mean_output)) == (19_366, 1155, 211)
    mooncake = load(DATA / "traces" / "mooncake_synthetic_trace.jsonl.gz")
    assert mooncake.count == 3993
