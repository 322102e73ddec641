"""L1: measured runs of vLLM beside the simulator on their layer times, as checks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vllm_suite.planner.sources.base import SourceError
from vllm_suite.planner.sources.roofline import RooflineSource
from vllm_suite.planner.validation.measured import Run, checks
from vllm_suite.planner.validation.shared_prompts import PUBLISHED, chains, of_run, overlaps

DATA = Path(os.environ.get("VLLM_SUITE_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data")


def test_measured_runs_of_vllm() -> None:
    if not (DATA / "llmservingsim").is_dir():
        pytest.skip(f"no {DATA / 'llmservingsim'}; set VLLM_SUITE_DATA")
    found = {check.what: check for check in checks(DATA)}
    for check in found.values():
        print(check.what, check.verdict, check.error, dict(check.others))
    llama = {what: check for what, check in found.items() if what.startswith("RTXPRO6000_Llama-3.1-8B:")}
    assert len(llama) == 4
    assert {check.verdict for check in llama.values()} == {"holds"}
    own = llama["RTXPRO6000_Llama-3.1-8B: TTFT mean (s)"]
    # From their summary: 7097.2 ms measured, and 4.0 % less predicted.
    assert own.reference == pytest.approx(7.0972, abs=1e-4)
    assert own.others["LLMServingSim"] == pytest.approx(-0.040, abs=6e-4)
    qwen = {what: check for what, check in found.items() if what.startswith("RTXPRO6000_Qwen3-32B:")}
    assert {check.verdict for check in qwen.values()} == {"holds"}
    for run, what in (("Llama-3.1-8B", "TPOT mean"), ("Llama-3.1-8B", "TTFT p99"), ("Qwen3-32B", "TTFT mean")):
        check = found[f"RTXPRO6000_{run}: {what} (s)"]
        assert abs(check.error or 1) < abs(check.others["LLMServingSim"])
    assert all("repeat each other" in check.note for check in found.values())


def run(folder: Path, engine: dict[str, object], model: str = "meta-llama/Llama-3.1-8B") -> Path:
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({"model": model, "vllm_version": "0.19.0", "engine_kwargs": engine}))
    rows = [
        {"input_toks": 10, "output_toks": 3, "queued_ts": 5.0 + i, "first_token_ts": 5.5 + i, "last_token_ts": 6.5 + i}
        for i in (1, 0)
    ]
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


ENGINE: dict[str, object] = {"tensor_parallel_size": 2, "max_num_seqs": 8, "max_num_batched_tokens": 64}


def test_a_run_is_read_as_it_was_measured(tmp_path: Path) -> None:
    found = Run.read(run(tmp_path / "RTX4090_Llama-3.1-8B", ENGINE))
    assert found.measured() == {"TTFT mean": 0.5, "TTFT p99": 0.5, "TPOT mean": 0.5, "latency mean": 1.5}
    assert [row["queued_ts"] for row in found.rows] == [5.0, 6.0]
    assert (found.parallel.tp, found.accelerators.gpus, found.accelerators.device.name) == (2, 2, "RTX-4090")
    assert found.theirs == {}
    tuned = Run.read(run(tmp_path / "RTXPRO6000_Q", {**ENGINE, "data_parallel_size": 2, "enable_expert_parallel": True},
                         "Qwen/Qwen3-30B-A3B-Instruct-2507"))  # fmt: skip
    assert tuned.base == "Qwen/Qwen3-30B-A3B"
    assert (tuned.parallel.dp, tuned.parallel.ep) == (2, True)
    half = Run.read(run(tmp_path / "RTXPRO6000_H", {**ENGINE, "dtype": "float16", "kv_cache_dtype": "fp8_e4m3"}))
    assert (half.quant.weights, half.quant.kv) == ("fp16", "fp8")
    with pytest.raises(SourceError, match="fp16-kvfp8"):
        half.tables(tmp_path)


def test_prompts_that_begin_alike_are_found(tmp_path: Path) -> None:
    """A workload of four prompts: the third repeats the first, the fourth the third and all of the first with it."""
    first, third = list(range(70)), [*range(48), *range(200, 260)]
    prompts = [first, list(range(1000, 1040)), third, [*third, 7]]
    folder = tmp_path / "workloads"
    folder.mkdir()
    lines = [json.dumps({"input_toks": len(each), "input_tok_ids": each}) for each in prompts]
    (folder / "w.jsonl").write_text("\n".join(lines) + "\n")
    assert overlaps(folder / "w.jsonl") == ((2, 0, 3), (3, 2, 6))
    known = of_run(tmp_path, {"dataset_path": "workloads/w.jsonl"}, 4)
    assert known is not None
    assert known[0] == known[2][:3] == known[3][:3]
    assert known[1] == ()
    assert known[2] == known[3]
    assert len(set(known[3])) == 6
    assert of_run(tmp_path, {"dataset_path": "other.jsonl"}, 4) is None
    assert [16 * sum(size for _, _, size in rows) for rows in PUBLISHED.values()] == [19_520, 20_448]
    assert of_run(tmp_path, {"dataset_hash": next(iter(PUBLISHED))}, 40) == ((),) * 40
    with pytest.raises(ValueError, match="request 1 begins like 1"):
        chains([(1, 1, 2)], 4)


def test_a_run_finds_its_repeated_prompts(tmp_path: Path) -> None:
    """Two requests of 3,200 tokens each, half of which is the same; the second comes when the first is done."""
    root = tmp_path / "llmservingsim"
    folder = run(root / "RTX4090_Llama-3.1-8B", ENGINE | {"max_num_batched_tokens": 4096})
    rows = [
        {"request_id": f"bench-{at}", "input_toks": 3200, "output_toks": 2, "queued_ts": 9.0 * at,
         "first_token_ts": 9.0 * at + 1, "last_token_ts": 9.0 * at + 2}
        for at in range(2)
    ]  # fmt: skip
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (root / "workloads").mkdir()
    ids = [list(range(3200)), [*range(1600), *range(9000, 10_600)]]
    (root / "workloads" / "w.jsonl").write_text("\n".join(json.dumps({"input_tok_ids": each}) for each in ids))
    meta = json.loads((folder / "meta.json").read_text())

    def ttft(**more: object) -> float:
        (folder / "meta.json").write_text(json.dumps(meta | more))
        found = Run.read(folder)
        source: RooflineSource = found.roofline()
        return found.predicted(source)["TTFT mean"]

    alone = ttft()
    shared = ttft(dataset_path="workloads/w.jsonl")
    assert shared == pytest.approx(0.75 * alone, rel=0.05)
    assert ttft(dataset_path="workloads/w.jsonl", kv_cache={"enable_prefix_caching": False}) == pytest.approx(alone)
    blocks = {"num_gpu_blocks": 250, "enable_prefix_caching": True}
    (folder / "meta.json").write_text(json.dumps(meta | {"kv_cache": blocks}))
    assert (Run.read(folder).blocks, Run.read(folder).prefix_caching) == (250, True)


@pytest.mark.parametrize(
    ("folder", "engine", "model", "reason"),
    [
        ("RTX4090_A", ENGINE, "meta-llama/Llama-3.1-8B", "meta.yaml"),
        ("TPUv5_A", ENGINE, "meta-llama/Llama-3.1-8B", "no device file for TPUv5"),
        ("RTX4090_B", ENGINE, "nobody/Model", "no bundled config of nobody/Model"),
    ],
)
def test_what_cannot_be_run_says_why(
    tmp_path: Path, folder: str, engine: dict[str, object], model: str, reason: str
) -> None:
    run(tmp_path / "llmservingsim" / folder, engine, model)
    (check,) = checks(tmp_path)
    assert (check.verdict, check.what) == ("not run", folder)
    assert reason in check.note


def test_no_data_is_said() -> None:
    (check,) = checks(Path("/nonexistent"))
    assert (check.id, check.verdict) == ("L1", "not run")
