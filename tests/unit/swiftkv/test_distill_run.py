"""Whole runs of ``vllm-suite swiftkv distill``: killed and resumed, on two processes, sharded, and told nonsense."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from vllm_swiftkv.distill.cli import add_arguments
from vllm_swiftkv.distill.cli import run as cli_run
from vllm_swiftkv.distill.config import DistillConfig, read
from vllm_swiftkv.families import SwiftKVError

TEXT = "the model reads every word of a prompt and answers with one word after another until it has said enough"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
COMMAND = ["-m", "vllm_suite.cli.main", "swiftkv", "distill"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    words = TEXT.split()
    texts = [" ".join(words[(i + j * (i % 3 + 1)) % len(words)] for j in range(5 + i % 9)) for i in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def settings(data: Path, checkpoint: Callable[..., Path]) -> dict[str, Any]:
    model = checkpoint("qwen3", num_hidden_layers=4, std=0.1)
    return {
        "model": model,
        "data": [data],
        "cut": 0.75,
        "max_steps": 8,
        "micro_batch": 2,
        "max_length": 64,
        "lr": 1e-3,
        "save_every": 3,
        "eval_share": 0.1,
        "precision": "fp32",
    }


@pytest.fixture(autouse=True)
def as_in_a_process_of_its_own() -> Iterator[None]:
    """One thread, since sums in another order round differently, and an accelerate that remembers no other run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    torch.set_num_threads(before)


def distill(**fields: Any) -> dict[str, Any]:
    from vllm_swiftkv.distill.train import distill as run

    return run(DistillConfig(**fields))


def cli(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return cli_run(parser.parse_args(words))


def flags(fields: dict[str, Any]) -> list[str]:
    out = []
    for name, value in fields.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        out += ["--" + name.replace("_", "-"), *map(str, values)]
    return out


def log_of(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "training" / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def straight(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("straight") / "out"
    torch.set_num_threads(1)
    return output, distill(**settings, output=output)


def test_a_run_leaves_a_checkpoint_its_log_and_the_newest_states(straight: tuple[Path, dict[str, Any]]) -> None:
    output, report = straight
    assert (output / "tokenizer.json").is_file()
    assert [line["step"] for line in log_of(output)] == [*range(1, 9)]
    assert sorted(p.name for p in (output / "training").glob("step-*")) == ["step-00000006", "step-00000008"]
    assert report["before"]["student"] != report["after"]["student"]
    assert report["before"]["teacher"] == report["after"]["teacher"]
    trained = load_file(output / "training" / "step-00000008" / "trained.safetensors")
    served = load_file(output / "model.safetensors")
    assert {name.removeprefix("model.") for name in trained} == {name for name in served if "_swiftkv" in name}
    assert all(torch.equal(served[name.removeprefix("model.")], tensor) for name, tensor in trained.items())
    assert not any(name.startswith("model.layers.2.self_attn.k_proj.") for name in served)


def test_a_killed_run_goes_on_to_the_same_bits(
    straight: tuple[Path, dict[str, Any]], settings: dict[str, Any], tmp_path: Path
) -> None:
    expected, report = straight
    output = tmp_path / "out"
    # As long as it may take, so that the kill comes before the end.
    started = subprocess.Popen(
        [sys.executable, *COMMAND, *flags(settings | {"output": output})], env=ENV, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (output / "training" / "step-00000003").is_dir():
            assert started.poll() is None, started.communicate()[1][-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        started.send_signal(signal.SIGKILL)
    finally:
        started.kill()
        started.communicate()
    assert not (output / "config.json").exists()
    with pytest.raises(SwiftKVError, match="--resume"):
        distill(**settings, output=output)
    with pytest.raises(SwiftKVError, match=r"lr was 0\.001, is 0\.002"):
        distill(**(settings | {"lr": 2e-3}), output=output, resume=True)
    resumed = distill(**settings, output=output, resume=True)
    assert resumed["resumed_at"] in (3, 6)
    assert log_of(output) == log_of(expected)
    assert (resumed["before"], resumed["after"]) == (report["before"], report["after"])
    assert (output / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    with pytest.raises(SwiftKVError, match="finished"):
        distill(**settings, output=output, resume=True)


def test_passes_of_a_step_add_up_to_it(
    straight: tuple[Path, dict[str, Any]], settings: dict[str, Any], tmp_path: Path
) -> None:
    expected, _ = straight
    distill(**(settings | {"micro_batch": 1, "accumulation": 2}), output=tmp_path / "out")
    for ours, theirs in zip(log_of(tmp_path / "out"), log_of(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_two_processes_are_one(straight: tuple[Path, dict[str, Any]], settings: dict[str, Any], tmp_path: Path) -> None:
    """Started as ``accelerate launch`` starts processes on GPUs; on CPUs it knows MPI alone."""
    expected, report = straight
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    own = settings | {"micro_batch": 1, "output": tmp_path / "out", "json": tmp_path / "report.json"}
    done = subprocess.run(
        [sys.executable, *launch, *COMMAND, *flags(own)], env=ENV, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["processes"] == 2
    assert found["provenance"]["versions"]["accelerate"]
    for ours, theirs in zip(log_of(tmp_path / "out"), log_of(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert found["after"] == pytest.approx(report["after"], rel=1e-4)


def test_bfloat16_recomputed_chats_of_experts_train(
    checkpoint: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    model = checkpoint("qwen3_moe", num_hidden_layers=4, std=0.1)
    chats = tmp_path / "chats.jsonl"
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    messages = [[{"role": "user", "content": "Say it."}, {"role": "assistant", "content": text}] for text in texts]
    chats.write_text("".join(json.dumps({"messages": m}) + "\n" for m in messages))
    config = tmp_path / "settings.yaml"
    config.write_text(f"model: {model}\ndata: [{chats}]\ncut_layer: 1\nprecision: bf16\nmax_steps: 99\n")
    own = flags({"config": config, "output": tmp_path / "out", "max_steps": 6, "max_length": 64, "lr": 0.01})
    assert cli(*own, "--recompute", "--no-packing", "--json", str(tmp_path / "report.json")) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["after"]["kl"] < found["before"]["kl"]
    assert found["settings"]["max_steps"] == 6
    served = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in served.values()} == {torch.bfloat16}
    assert "model.layers.3.mlp.experts.0.gate_proj.weight" in served


SHARDED = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from vllm_swiftkv.distill import rows, state, store
from vllm_swiftkv.distill.student import Student
from vllm_swiftkv.hf.checkpoint import load

def worker(rank, model, prepared, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{out}/store")
    data = store.open_store(Path(prepared))
    def trained(shard):
        student = Student(load(model, cut=1), 2.0, 64)
        if shard:
            mesh = init_device_mesh("cpu", (2,))
            for layer in student.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(student, mesh=mesh)
        optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3)
        logged = []
        for step in range(3):
            chosen = [2 * step + rank] if shard else [2 * step, 2 * step + 1]
            sums = student(rows.collate(data, [rows.np.array([c]) for c in chosen]))
            loss = (sums["kl"] + sums["mse"]) * (2 if shard else 1)  # a sharded gradient is a mean
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                kept = {"step": step, "fingerprint": {}}
                folder = Path(out) / ("sharded" if shard else "whole")
                state.save_state(folder, student, optimizer, kept, main=rank == 0, keep=1)
                dist.barrier()
                state.load_state(state.checkpoints(folder)[-1], student, optimizer)
        full = state.get_state_dict(student, optimizer, options=state.StateDictOptions(**state._FULL))[0]
        return full
    sharded, whole = trained(True), trained(False)
    if rank == 0:
        assert sharded.keys() == whole.keys() and sharded
        worst = max(float((sharded[n] - whole[n]).abs().max()) for n in whole)
        start = dict(Student(load(model, cut=1), 2.0, 64).named_parameters())
        moved = max(float((whole[n] - start[n]).detach().abs().max()) for n in whole)
        print("worst", worst, "moved", moved)
        assert worst < 1e-4 < moved, (worst, moved)
    dist.barrier()
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(worker, args=tuple(sys.argv[1:]), nprocs=2)
"""


def test_sharded_weights_train_as_whole_ones(settings: dict[str, Any], data: Path, tmp_path: Path) -> None:
    """FSDP version 2 over two processes. accelerate shards on accelerators only, so torch is asked directly."""
    import transformers

    from vllm_swiftkv.distill.store import prepare

    tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model"])
    prepared = prepare([data], tokenizer, 64, tmp_path)
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    done = subprocess.run(
        [sys.executable, str(script), str(settings["model"]), str(prepared), str(tmp_path)],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 1}, "settings.yaml: rate: no such setting"),
        ({"lr": -1}, "settings.yaml: lr: .*greater than 0"),
        ({"cut_layer": 2}, "give one"),
        ({"model": None}, "settings.yaml: model"),
        ({"data": []}, "data: .*at least 1"),
    ],
)
def test_bad_settings_name_file_and_key(
    change: dict[str, Any], message: str, tmp_path: Path, settings: dict[str, Any]
) -> None:
    import yaml

    plain = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(plain | {"data": ["x.jsonl"], "output": "out"} | change))
    with pytest.raises(SwiftKVError, match=message):
        read(file, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cut": 0.01}, "leaves no split"),
        ({"cut_layer": 9}, "between 1 and 3"),
        ({"model": "absent"}, "no config.json"),
        ({"data": "absent.jsonl"}, "does not exist"),
        ({"lr": "fast"}, "lr: .*valid number"),
        ({"chat_template": "absent.jinja"}, "absent.jinja cannot be read"),
    ],
)
def test_what_cannot_work_ends_with_2(
    change: dict[str, Any],
    message: str,
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = settings | {"output": tmp_path / "out"}
    if "cut_layer" in change:
        own.pop("cut")
    assert cli(*flags(own | change)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out" / "config.json").exists()


def test_other_files_in_the_output_are_left_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SwiftKVError, match=r"other files \(thesis\.tex\)"):
        distill(**settings, output=tmp_path)


def test_the_parser_imports_no_torch() -> None:
    code = (
        "import argparse, sys, vllm_swiftkv.distill.cli as c; c.add_arguments(argparse.ArgumentParser());"
        "sys.exit(bool({'torch', 'transformers', 'vllm', 'accelerate'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
