"""Trace readers, and the prompts made from them."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_suite.fleet.prompts import Scale, build_prompts, fit
from vllm_suite.fleet.traces import (
    AZURE_HEADER,
    ENV_DATA,
    Trace,
    TraceError,
    TraceRequest,
    default_trace,
    load_trace,
    read_trace,
    synthetic_trace,
)

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
)
MOONCAKE = (
    '{"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]}\n'
    '{"timestamp": 3500, "input_length": 600, "output_length": 6, "hash_ids": [7, 10]}\n'
)
IDS = range(8, 480)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_azure(tmp_path: Path, name: str) -> None:
    trace = read_trace(write(tmp_path, name, AZURE), 10)
    assert [(r.input_tokens, r.output_tokens) for r in trace.requests] == [(374, 44), (396, 109)]
    assert trace.requests[0].arrival_s == 0
    assert trace.requests[1].arrival_s == pytest.approx(4.314579, abs=1e-5)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_mooncake(tmp_path: Path, name: str) -> None:
    trace = read_trace(write(tmp_path, name, MOONCAKE), 10)
    assert trace.requests == (TraceRequest(0.0, 1100, 5, (7, 8, 9)), TraceRequest(2.5, 600, 6, (7, 10)))


def test_only_the_first_requests_are_read(tmp_path: Path) -> None:
    # The third line is wrong and must not be reached.
    assert len(read_trace(write(tmp_path, "a.csv", AZURE + "nonsense\n"), 2).requests) == 2


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.txt", AZURE, "a trace is a .csv"),
        ("a.csv", "", ":1: the header must be " + ",".join(AZURE_HEADER)),
        ("a.csv", "TIMESTAMP,Context\n", ":1: the header must be"),
        ("a.csv", AZURE.splitlines()[0], "no request"),
        ("a.csv", AZURE + "2023-11-16 18:15:46,1\n", ":4: 3 columns are expected, found 2"),
        ("a.csv", AZURE + "yesterday,1,1\n", ":4: TIMESTAMP is not a date and time: 'yesterday'"),
        ("a.csv", AZURE + "2023-11-16 18:15:46,x,1\n", ":4: ContextTokens must be a whole number of at least 1"),
        ("a.csv", AZURE + "2023-11-16 18:15:46,1,-1\n", ":4: GeneratedTokens must be a whole number of at least 0"),
        ("a.jsonl", MOONCAKE + "{", ":3: not JSON"),
        ("a.jsonl", MOONCAKE + "\n[]\n", ":4: an object is expected, found list"),
        ("a.jsonl", '{"timestamp": 0, "output_length": 1}', ":1: input_length must be a whole number"),
        ("a.jsonl", MOONCAKE.replace("[7, 10]", '["x"]'), ":2: hash_ids is not a list of whole numbers"),
        ("a.jsonl", MOONCAKE.replace("[7, 10]", "[1, 2, 3]"), ":2: 3 hash_ids for 600 tokens"),
        ("a.jsonl.gz", "", "no request"),
    ],
)
def test_a_wrong_trace_names_the_line(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(TraceError) as error:
        read_trace(path, 100)
    assert str(error.value).startswith(str(path))
    assert says in str(error.value)


def test_a_gz_that_is_none_is_a_trace_error(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_text(AZURE)
    with pytest.raises(TraceError, match=r"a\.csv\.gz"):
        read_trace(path, 1)


def test_the_data_folder_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_DATA, str(tmp_path))
    assert default_trace() is None
    assert load_trace(None, 5, seed=1).name == "synthetic-1"
    (tmp_path / "traces").mkdir()
    write(tmp_path / "traces", "AzureLLMInferenceTrace_2023_conv.csv", AZURE)
    assert load_trace(None, 5).name == "AzureLLMInferenceTrace_2023_conv.csv"


def test_the_real_traces_are_read() -> None:
    path = default_trace()
    if path is None:
        pytest.skip("no trace in the data folder (VLLM_SUITE_DATA)")
    azure = read_trace(path, 1000)
    assert len(azure.requests) == 1000
    mooncake = path.with_name("mooncake_synthetic_trace.jsonl.gz")
    if mooncake.is_file():
        assert any(request.prefix_ids for request in read_trace(mooncake, 100).requests)


@given(st.integers(1, 200), st.integers(0, 10))
def test_the_synthetic_trace_is_reproducible_and_ordered(limit: int, seed: int) -> None:
    trace = synthetic_trace(limit, seed)
    assert trace == synthetic_trace(limit, seed)
    arrivals = [request.arrival_s for request in trace.requests]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] == 0
    assert all(8 <= request.input_tokens <= 8192 for request in trace.requests)


def test_the_synthetic_trace_shares_prefixes() -> None:
    ids = [block for request in synthetic_trace(100).requests for block in request.prefix_ids]
    assert len(set(ids)) < len(ids)


@given(st.integers(1, 60), st.integers(2, 4000), st.floats(0.1, 100), st.integers(0, 5))
def test_prompts_fit_and_keep_the_order(limit: int, longest: int, duration_s: float, seed: int) -> None:
    trace = synthetic_trace(limit, seed)
    scale = fit(trace, longest, duration_s)
    prompts = build_prompts(trace, scale, IDS, seed)
    assert prompts == build_prompts(trace, scale, IDS, seed)
    assert all(2 <= len(prompt.token_ids) <= max(2, longest) for prompt in prompts)
    assert all(set(prompt.token_ids) <= set(IDS) for prompt in prompts)
    assert prompts[-1].arrival_s <= duration_s * (1 + 1e-9)
    assert scale.length <= 1
    assert scale.time <= 1


def test_equal_ids_give_equal_content_and_nothing_else_does(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, "a.jsonl", MOONCAKE), 10)
    first, second = build_prompts(trace, Scale(1.0, 1.0, 4096), IDS)
    assert (len(first.token_ids), len(second.token_ids)) == (1100, 600)
    assert first.token_ids[:512] == second.token_ids[:512]
    assert first.token_ids[512:600] != second.token_ids[512:600]


def test_requests_without_ids_share_nothing() -> None:
    trace = Trace("t", (TraceRequest(0, 100, 1), TraceRequest(1, 100, 1)))
    first, second = build_prompts(trace, Scale(1.0, 1.0, 4096), IDS)
    assert first.token_ids[:10] != second.token_ids[:10]
