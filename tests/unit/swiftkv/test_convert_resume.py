"""Conversions that are killed, damaged or run twice: the next one goes on, and half a result is never a result."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from vllm_suite.checkpoints.progress import Progress
from vllm_suite.cli.main import main
from vllm_swiftkv.convert.errors import ConvertError
from vllm_swiftkv.convert.run import Request, convert

Checkpoint = Callable[..., Path]


def request(model: Path, out: Path, **options: Any) -> Request:
    return Request(model, out, **({"cut": 0.5, "shard_bytes": 1_000_000} | options))


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def shards(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file each finished weight file is: the same one again is one that was not written again."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("model-*.safetensors")}


# Converts again and again, each time into a new folder and killed at the next file operation, until one is not.
KILLED_EVERYWHERE = """
import os, signal, sys
from pathlib import Path
from vllm_suite.checkpoints.progress import Progress
from vllm_swiftkv.convert.run import Request, convert
from vllm_swiftkv.convert.verify import verify  # imported before the fork
import numpy, safetensors

model, root = map(Path, sys.argv[1:])
at = 0
while True:
    at += 1
    out = root / str(at) / "out"
    out.parent.mkdir()
    child = os.fork()
    if child == 0:
        seen = 0
        def hook(event, args):
            global seen
            if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(out) in str(args[0]):
                seen += 1
                if seen == at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        with open(os.devnull, "w") as quiet:
            convert(Request(model, out, cut=0.5, shard_bytes=1_000_000), Progress(quiet))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
"""


def test_killed_at_every_file_operation(checkpoint: Checkpoint, ram: Path) -> None:
    model = checkpoint("qwen3")
    convert(request(model, ram / "whole"), Progress())
    whole = content(ram / "whole")
    files = len(shards(ram / "whole"))
    (ram / "killed").mkdir()
    command = [sys.executable, "-c", KILLED_EVERYWHERE, str(model), str(ram / "killed")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    places = sorted((ram / "killed").iterdir(), key=lambda p: int(p.name))
    assert len(places) > 60
    finished: set[int] = set()
    for place in places[:-1]:  # nothing killed the last one
        out, partial = place / "out", place / "out.partial"
        if out.exists():  # killed after the rename
            assert content(out) == whole
            assert not partial.exists()
        else:
            assert not (partial / "model.safetensors.index.json").exists() or len(shards(partial)) == files
        before = shards(partial) | shards(out)
        report = convert(request(model, out), Progress())
        assert report["shards_reused"] == sorted(before)
        assert before.items() <= shards(out).items()
        assert content(out) == whole
        assert not partial.exists()
        finished.add(len(before))
    assert finished == set(range(files + 1))


def test_killed_at_any_moment(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Real processes and the real clock, also in the middle of a write: killed every few files until it is done."""
    model = checkpoint("llama", hidden_size=512, intermediate_size=2048, head_dim=128, std=0.1)  # 140 MB
    convert(request(model, tmp_path / "whole", shard_bytes=4_000_000), Progress())
    command = [sys.executable, "-m", "vllm_suite.cli.main", "swiftkv", "convert", "--model", str(model)]
    command += ["--cut", "0.5", "--shard-size", "4MB", "-o", str(tmp_path / "out")]
    rng = random.Random(os.urandom(8))
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    kills = halves = 0
    deadline = time.monotonic() + 60
    while not out.exists():
        before = shards(partial)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        enough = len(before) + rng.randint(2, 8)
        while process.poll() is None and len(list(partial.glob("model-*"))) < enough and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        process.kill()
        status = process.wait(10)
        assert status in (0, -signal.SIGKILL)
        assert before.items() <= (shards(out) if out.exists() else shards(partial)).items()
        kills += status != 0
        halves += any(partial.glob(".model-*.tmp"))
        assert time.monotonic() < deadline
    print(f"{kills} kills, {halves} of them in the middle of a file")
    assert kills
    assert content(out) == content(tmp_path / "whole")
    assert not partial.exists()


@pytest.fixture
def interrupted(checkpoint: Checkpoint, ram: Path) -> tuple[Path, Path]:
    """A model and `out.partial` with three of its six weight files."""
    model = shutil.copytree(checkpoint("llama"), ram / "model")
    convert(request(model, ram / "out"), Progress())
    (ram / "out").rename(ram / "out.partial")
    for name in ("model.safetensors.index.json", "config.json", "tokenizer.json"):
        (ram / "out.partial" / name).unlink()
    for i in (4, 5, 6):
        (ram / "out.partial" / f"model-{i:05d}-of-00006.safetensors").unlink()
    return model, ram / "out"


@pytest.mark.parametrize("damage", ["flipped", "truncated", "grown", "empty"])
def test_a_damaged_weight_file_is_written_again(
    interrupted: tuple[Path, Path], damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = interrupted
    bad = out.with_name("out.partial") / "model-00002-of-00006.safetensors"
    data = bytearray(bad.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    bad.write_bytes({"flipped": data, "truncated": data[:-1], "grown": data + b"x", "empty": b""}[damage])
    report = convert(request(model, out), Progress())
    assert report["shards_written"] == [f"model-{i:05d}-of-00006.safetensors" for i in (2, 4, 5, 6)]
    assert "model-00002-of-00006.safetensors is damaged" in capsys.readouterr().err
    convert(request(model, out.with_name("fresh")), Progress())
    assert content(out) == content(out.with_name("fresh"))


def test_leftovers_of_a_kill_are_removed(interrupted: tuple[Path, Path]) -> None:
    model, out = interrupted
    partial = out.with_name("out.partial")
    for name in (".model-00004-of-00006.safetensors.tmp", ".vocabulary.txt.tmp"):
        (partial / name).write_bytes(b"half")
    report = convert(request(model, out), Progress())
    assert report["shards_reused"] == [f"model-{i:05d}-of-00006.safetensors" for i in (1, 2, 3)]
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cut": 0.25}, "cut 4 there, 6 here"),
        ({"group": 2}, "group 1 there, 2 here"),
        ({"keep_teacher": True}, "keep_teacher False there, True here"),
        ({"shard_bytes": 2_000_000}, "shard_size 1000000 there, 2000000 here"),
    ],
)
@pytest.mark.parametrize("where", ["out", "out.partial"])
def test_another_conversion_is_refused(
    interrupted: tuple[Path, Path], options: dict[str, Any], reason: str, where: str
) -> None:
    model, out = interrupted
    if where == "out":
        convert(request(model, out), Progress())
    before = content(out.with_name(where))
    with pytest.raises(ConvertError, match=reason):
        convert(request(model, out, **options), Progress())
    assert content(out.with_name(where)) == before


@pytest.mark.parametrize("change", ["weights", "config"])
def test_a_changed_source_is_refused(interrupted: tuple[Path, Path], change: str) -> None:
    model, out = interrupted
    if change == "weights":
        with (model / "model.safetensors").open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\0\0")
    else:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    before = content(out.with_name("out.partial"))
    with pytest.raises(ConvertError, match=r"the source.* changed"):
        convert(request(model, out), Progress())
    assert content(out.with_name("out.partial")) == before


def test_a_source_that_changes_meanwhile_is_noticed(interrupted: tuple[Path, Path]) -> None:
    model, out = interrupted

    class Touching(Progress):
        def wrote(self, name: str) -> None:
            os.utime(model / "model.safetensors", ns=(1, 1))

    with pytest.raises(ConvertError, match="changed while it was read"):
        convert(request(model, out), Touching())
    assert not out.exists()


def test_two_at_once(interrupted: tuple[Path, Path]) -> None:
    model, out = interrupted
    partial = out.with_name("out.partial")
    other = os.open(partial, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    before = content(partial)
    with pytest.raises(ConvertError, match="in use by another conversion"):
        convert(request(model, out), Progress())
    assert content(partial) == before
    os.close(other)
    assert convert(request(model, out), Progress())["ok"]


@pytest.mark.parametrize("manifest", ["", "{", "[]", '{"plan": 3}', '{"plan": {}, "shards": []}'])
def test_a_damaged_manifest_is_refused(interrupted: tuple[Path, Path], manifest: str) -> None:
    model, out = interrupted
    partial = out.with_name("out.partial")
    (partial / "swiftkv_conversion.json").write_text(manifest)
    before = content(partial)
    with pytest.raises(ConvertError, match=r"swiftkv_conversion\.json"):
        convert(request(model, out), Progress())
    assert content(partial) == before


def test_a_finished_result_is_only_verified(interrupted: tuple[Path, Path]) -> None:
    model, out = interrupted
    convert(request(model, out), Progress())
    before = {p: p.stat().st_mtime_ns for p in [out, *out.iterdir()]}
    report = convert(request(model, out), Progress())
    assert report["shards_written"] == []
    assert report["verified"]["tensors"] == report["tensors"]
    assert {p: p.stat().st_mtime_ns for p in [out, *out.iterdir()]} == before


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, resource.RLIM_INFINITY))
from vllm_suite.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_write_that_fails_midway_loses_nothing(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files makes the kernel refuse a write, as a full disk does."""
    model, out = checkpoint("llama"), tmp_path / "out"
    words = ["swiftkv", "convert", "--model", str(model), "--cut", "0.5", "--shard-size", "1MB", "-o", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "make room and run the same command again" in done.stderr.splitlines()[-1]
    assert not out.exists()
    assert main(words) == 0
    assert "verified" in capsys.readouterr().err
