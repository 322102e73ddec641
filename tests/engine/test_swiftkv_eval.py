"""`vllm-suite swiftkv eval` from end to end on the tasks of docs/examples/swiftkv-eval, a real engine for each run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import reference_swiftkv
import transformers
from child import ENGINE_ENV
from evaluation import PYTHON, REASON
from swiftkv_checkpoints import make_swiftkv_checkpoint

from vllm_suite.fleet.tiny import make_tiny_model

# Three engines and as many starts of the harness; what the command does without an engine is in tests/unit/swiftkv.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(620),
    pytest.mark.skipif(PYTHON is None, reason=REASON),
]

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "swiftkv-eval"
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": 64 << 20}
NEW_TOKENS = 12  # max_gen_toks of sums.yaml
TOLERANCE = 1e-3  # of a sum over an ending's tokens, in float32


def evaluate(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # Another working directory than the repository: task files, data and checkpoints are found all the same.
    env = {**os.environ, **ENGINE_ENV, "HF_HOME": str(cwd / "home"), "VLLM_SUITE_PLUGINS": "disagg"}
    command = [str(PYTHON), "-m", "vllm_suite.cli.main", "swiftkv", "eval", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=580, check=False, env=env, cwd=cwd)


def samples(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_both_kinds_of_run_beside_a_base_model(tmp_path: Path) -> None:
    model = make_swiftkv_checkpoint(tmp_path / "swiftkv", "llama", group=2)
    base = make_tiny_model(tmp_path / "base")
    tasks = ["--include-path", str(EXAMPLE), "--tasks", "suite_capitals,suite_sums"]
    files = ["--json", "out/report.json", "--samples", "samples"]
    done = evaluate(
        *["--model", str(model), "--base", str(base), *tasks, *files, "--engine-args", json.dumps(ENGINE)], cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["complete"]

    # One run without the skip, one with it, one of the base model.
    runs = [(run["model"], run["skip"], list(run["requests"])) for run in report["runs"]]
    assert runs == [
        (str(model), False, ["suite_capitals"]),
        (str(model), True, ["suite_sums"]),
        (str(base), None, ["suite_capitals", "suite_sums"]),
    ]
    off, on, plain = (next(iter(run["requests"].values()))["counters"] for run in report["runs"])
    assert set(off.values()) == {0}, "the skip's own attention metadata was built"
    assert on["prompt_tokens"] > 100
    assert on["tail_rows_skipped"] == on["prompt_tokens"] - 12, "all of each prompt but the row that is sampled"
    assert plain == {}

    # What the engines computed is what the reference computes.
    right = {"suite_capitals": 0.0, "suite_sums": 0.0}
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(base)  # of both
    for label, path in (("model", model), ("base", base)):
        reference = reference_swiftkv.load(path)
        capitals = samples(tmp_path / "samples", f"{label}_suite_capitals")
        assert len(capitals) == 12
        hits = [check_choice(reference, tokenizer, sample) for sample in capitals]
        sums = samples(tmp_path / "samples", f"{label}_suite_sums")
        assert len(sums) == 12
        for sample in sums:
            check_text(reference, tokenizer, sample)
        if label == "model":
            right = {"suite_capitals": sum(hits) / 12, "suite_sums": sum(s["exact_match"] for s in sums) / 12}
    assert {row["task"]: row["value"] for row in report["rows"] if row["headline"]} == pytest.approx(right)
    assert report["average"]["value"] == pytest.approx(sum(right.values()) / 2)
    assert report["average"]["difference"] == pytest.approx(report["average"]["value"] - report["average"]["base"])

    # What a reader gets, and what makes it repeatable.
    rows = [line.replace("│", " ").split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows if "off" in row] == ["suite_capitals", "suite_capitals"]
    assert [row[0] for row in rows if "on" in row] == ["suite_sums"]
    made = report["provenance"]
    assert made["seed"] == 1234
    assert made["commit"]
    assert "--base" in made["argv"]
    assert all(made["versions"][name] for name in ("lm_eval", "vllm", "torch", "transformers", "suite", "datasets"))
    assert {row["version"] for row in report["rows"]} == {1.0}


def check_choice(reference: reference_swiftkv.Reference, tokenizer: Any, sample: dict[str, Any]) -> bool:
    """Log-likelihoods of the endings; says whether the likeliest is the right one."""
    values = []
    for (context, ending), [(value, greedy)] in zip(arguments(sample), sample["resps"], strict=True):
        start, ids = len(tokenizer(context).input_ids), tokenizer(context + ending).input_ids
        table = reference.logits(ids).log_softmax(-1)
        own = [table[i - 1, ids[i]].item() for i in range(start, len(ids))]
        assert float(value) == pytest.approx(sum(own), abs=TOLERANCE)
        assert (str(greedy) == "True") == all(int(table[i - 1].argmax()) == ids[i] for i in range(start, len(ids)))
        values.append(sum(own))
    return values.index(max(values)) == sample["doc"]["answer"]


def check_text(reference: reference_swiftkv.Reference, tokenizer: Any, sample: dict[str, Any]) -> None:
    """The text is the greedy continuation up to the first line end or the end of the text."""
    [(context, _)], [[text]] = arguments(sample), sample["resps"]
    ids = reference.greedy(tokenizer(context).input_ids, NEW_TOKENS)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    expected = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).split("\n")[0]
    # Of a character cut off at the very end vLLM gives nothing, the tokenizer the replacement character.
    assert text == expected.rstrip("\ufffd")


def arguments(sample: dict[str, Any]) -> list[Any]:
    found = sample["arguments"]
    return list(found.values()) if isinstance(found, dict) else found
