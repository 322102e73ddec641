"""DLER on two processes: answers are dealt out anew, and both take the same steps."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
import wordy_sums
import yaml
from evaluation import PYTHON
from test_train_run import has_trl
from train_child import SETTINGS

pytestmark = [pytest.mark.skipif(not has_trl(), reason="TRL is not installed; run `make setup`"), pytest.mark.slow]


def test_two_processes(tmp_path: Path) -> None:
    model = tmp_path / "model"
    wordy_sums.make_tokenizer().save_pretrained(model)
    torch.manual_seed(0)
    ids = {"pad_token_id": wordy_sums.PAD_ID, "eos_token_id": wordy_sums.EOS_ID, "bos_token_id": None}
    shape = {**wordy_sums.SHAPE, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    config = transformers.LlamaConfig(**shape, **ids, vocab_size=len(wordy_sums.VOCABULARY))
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    data = wordy_sums.write_data(tmp_path / "rows.jsonl", wordy_sums.questions(40))
    run = tmp_path / "run.yaml"
    # A round of 3 prompts with 4 answers each is 6 answers a process: the middle group is spread over both.
    settings = SETTINGS | {"model": str(model), "data": [str(data)], "micro_batch": 4, "eval_rows": 7, "steps": 2}
    run.write_text(yaml.safe_dump(settings))
    # What `accelerate launch` starts for GPUs; for CPUs it wants MPI.
    launch = [str(PYTHON), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["-m", "vllm_suite.cli.main", "dler", "train", str(run), "-o", str(tmp_path / "out")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    done = subprocess.run(
        [*launch, "--json", str(tmp_path / "report.json")],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["processes"] == 2
    assert report["before"]["answers"] == 7  # 4 at a time and process: the second has 3
    lines = [json.loads(line) for line in (tmp_path / "out" / "training" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if not line.get("measured")]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(step["groups_sampled"] == 3 * step["rounds"] for step in steps)
    assert all(step["gradient_norm"] > 0 for step in steps)
    checkpoint = tmp_path / "out" / "training" / "checkpoint-4"
    assert {p.name for p in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    files = json.loads((checkpoint / "dler.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors", "optimizer.pt"} <= files.keys()
