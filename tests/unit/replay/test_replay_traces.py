"""Readers of the replay's traces, and the workloads made of them: errors name file, line and reason."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from replay_harness import ROOM, STEPS
from replay_traces import UNRECORDED_PROMPT, Row, read_rows, read_servegen
from replay_workload import Arrivals, Source, capacity

from vllm_suite.fleet.traces import TraceError

SERVEGEN = "arrival_s,client,input_tokens,output_tokens\n1.5,7,10,20\n0.5,9,30,40\n"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_a_table_with_clients_is_read_in_order_of_arrival(tmp_path: Path, name: str) -> None:
    rows = read_rows(write(tmp_path, name, SERVEGEN))
    assert rows == [Row(0.5, 30, 40, "9"), Row(1.5, 10, 20, "7")]


def test_tables_without_arrivals_or_prompts(tmp_path: Path) -> None:
    lmsys = "idx,output_token_length,pred_multi_cls,pred_binary_cls,pred_latency_s_multi\n0,40,1,0,0.02\n1,0,3,0,0.01\n"
    assert read_rows(write(tmp_path, "l.csv", lmsys)) == [
        Row(None, UNRECORDED_PROMPT, 40, "1"),
        Row(None, UNRECORDED_PROMPT, 1, "3"),
    ]
    vidur = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3772,54,3826,69.8\n"
    assert read_rows(write(tmp_path, "v.csv", vidur)) == [Row(None, 3772, 54)]


def test_azure_and_mooncake_come_through_the_suites_reader(tmp_path: Path) -> None:
    azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n"
    assert read_rows(write(tmp_path, "a.csv", azure)) == [Row(0.0, 4808, 10)]
    line = json.dumps({"timestamp": 7, "input_length": 600, "output_length": 6, "hash_ids": [4, 9]})
    assert read_rows(write(tmp_path, "m.jsonl.gz", line)) == [Row(0.0, 600, 6, "", (4, 9))]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.csv", SERVEGEN + "2,7,10\n", "t.csv:4: 4 columns are expected, found 3"),
        ("t.csv", SERVEGEN + "2,7,10,many\n", "t.csv:4: output_tokens must be a number of at least 0, found 'many'"),
        ("t.csv", SERVEGEN + "-1,7,10,10\n", "t.csv:4: arrival_s must be a number of at least 0, found '-1'"),
        ("t.csv", SERVEGEN + "nan,7,10,10\n", "t.csv:4: arrival_s must be"),
        ("t.csv", SERVEGEN + "1,7,1.5,10\n", "t.csv:4: input_tokens must be a whole number, found '1.5'"),
        ("t.csv", "arrival_s,client,input_tokens,output_tokens\n", "t.csv: no request in the trace"),
        ("t.csv", "a,b\n1,2\n", "t.csv:1: the header must be"),
        ("t.jsonl", '{"timestamp": 0}\n', "t.jsonl:1: input_length must be a whole number"),
        ("t.txt", "", "t.txt: a trace is a .csv, .jsonl or ServeGen's .tar.gz"),
    ],
)
def test_a_bad_trace_is_refused_with_its_place(tmp_path: Path, name: str, text: str, words: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(TraceError) as error:
        read_rows(path)
    assert words in str(error.value)


def test_a_missing_and_a_broken_file(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"none\.csv"):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(SERVEGEN.encode())[:30])
    with pytest.raises(TraceError, match=r"cut\.csv\.gz"):
        read_rows(tmp_path / "cut.csv.gz")


def archive(folder: Path, files: dict[str, str]) -> Path:
    path = folder / "servegen.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"deepseek-r1/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


def servegen(folder: Path, windows: str) -> Path:
    lengths = {"0": {"input_tokens": "{10: 0.5, 12: 0.5}", "output_tokens": "{100: 1.0}", "reason_ratio": "{}"}}
    return archive(folder, {"chunk-3-trace.csv": windows, "chunk-3-dataset.json": json.dumps(lengths)})


def test_servegens_archive_is_drawn_from(tmp_path: Path) -> None:
    path = servegen(tmp_path, "0,2.0,1.5,Gamma,0.4,1\n600,0,0,,0,0\n1200,1.0,1.0,Weibull,0.9,1\n")
    source = Source([path])
    rows = source.draw(500, 0, Arrivals(rate=4.0), ROOM, STEPS)
    assert {row.output for row in rows} == {100}
    assert {row.prompt for row in rows} == {10, 12}
    assert {row.label for row in rows} == {"3"}
    assert rows[-1].arrival_s == pytest.approx(499 / 4.0)


@pytest.mark.parametrize(
    ("windows", "words"),
    [
        ("0,2.0,1.5,Gamma,0.4\n", "chunk-3-trace.csv:1: 6 columns"),
        ("0,0,0,,0,0\n600,1,1,Pareto,1,1\n", "chunk-3-trace.csv:2: the pattern is Gamma or Weibull, found 'Pareto'"),
        ("0,x,1.5,Gamma,0.4,1\n", "chunk-3-trace.csv:1: a time, rate or CV must be a number"),
    ],
)
def test_a_bad_archive_is_refused_with_its_place(tmp_path: Path, windows: str, words: str) -> None:
    with pytest.raises(TraceError) as error:
        read_servegen(servegen(tmp_path, windows))
    assert words in str(error.value)


def test_an_archive_without_half_of_a_client(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"chunk-1-dataset\.json is missing"):
        read_servegen(archive(tmp_path, {"chunk-1-trace.csv": ""}))
    with pytest.raises(TraceError, match=r"no chunk-N-trace\.csv"):
        read_servegen(archive(tmp_path, {"readme": ""}))


def test_draws_repeat_and_seeds_differ(tmp_path: Path) -> None:
    text = "arrival_s,client,input_tokens,output_tokens\n" + "".join(
        f"{i},{i % 3},{i + 1},{i + 2}\n" for i in range(90)
    )
    source = Source([write(tmp_path, "t.csv", text)])
    first = source.draw(30, 1, Arrivals(rate=2.0), ROOM, STEPS)
    assert first == source.draw(30, 1, Arrivals(rate=2.0), ROOM, STEPS)
    assert first != source.draw(30, 2, Arrivals(rate=2.0), ROOM, STEPS)
    assert first[0].arrival_s == 0
    assert first[-1].arrival_s == pytest.approx(29 / 2.0)


def test_recorded_windows_of_two_seeds_share_no_request(tmp_path: Path) -> None:
    text = "arrival_s,client,input_tokens,output_tokens\n" + "".join(f"{i * i},1,{i + 1},5\n" for i in range(90))
    source = Source([write(tmp_path, "t.csv", text)])
    drawn = [source.draw(30, seed, Arrivals("recorded", rate=1.0), ROOM, STEPS) for seed in range(3)]
    assert [row.prompt for rows in drawn for row in rows] == list(range(1, 91))
    gaps = [b.arrival_s - a.arrival_s for a, b in zip(drawn[0], drawn[0][1:], strict=False)]  # type: ignore[operator]
    assert gaps[1] / gaps[0] == pytest.approx(3.0)
    with pytest.raises(ValueError, match="seeds 0 to 2, not 3"):
        source.draw(30, 3, Arrivals("recorded", rate=1.0), ROOM, STEPS)


def test_merged_tables_are_labelled_with_their_names(tmp_path: Path) -> None:
    azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:0{},4808,10\n2023-11-16 18:17:09,9,9\n"
    paths = [write(tmp_path, f"{name}.csv", azure.format(at)) for at, name in enumerate(("code", "conv"))]
    assert [row.label for row in Source(paths).rows] == ["code", "conv", "conv", "code"]
    rows = Source(paths, labels=False).draw(4, 0, Arrivals("recorded", rate=1), ROOM, STEPS)
    assert {row.label for row in rows} == {""}


def test_capacity_by_hand() -> None:
    # 4 slots and contexts of 100 + 50 / 2: steps of 9 ms + 4 * (20 us + 125 * 22 ns), 50 / 4 of them for a request.
    rows = [Row(0.0, 100, 50)] * 3
    step = 9e-3 + 4 * (20e-6 + 125 * 22e-9)
    assert capacity(rows, ROOM, STEPS) == pytest.approx(1 / (50 / 4 * step + 100 * 22e-6))
