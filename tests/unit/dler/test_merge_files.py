"""What a merge reads and writes: shards, side files, provenance; and kills, changes and damage on the way."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

import torch
from merge_models import Tensors, equal, read, reference, write

from vllm_dler.merge.run import ReadBackError, Request, merge
from vllm_suite.checkpoints.progress import Progress
from vllm_suite.checkpoints.source import CheckpointError
from vllm_suite.cli.main import main

MIB = 2**20


@pytest.fixture
def ram() -> Iterator[Path]:
    """A folder in memory where there is one: fsync on a busy disk would be most of a test's time."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def model(seed: int, dtype: Any = torch.bfloat16) -> Tensors:
    """Two layers; the names' order differs from that of their numbers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (64, 32), "model.norm.weight": (32,), "lm_head.weight": (64, 32)}
    for i in range(12):
        shapes |= {f"model.layers.{i}.mlp.weight": (32, 48), f"model.layers.{i}.norm.weight": (32,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def trained(base: Tensors, seed: int = 1, share: float = 0.6) -> Tensors:
    """Some updates; many equal, as those of bfloat16 are."""
    generator = torch.Generator().manual_seed(seed)
    step = {name: torch.randint(-4, 5, tensor.shape, generator=generator) * 2.0**-6 for name, tensor in base.items()}
    hit = {name: torch.rand(tensor.shape, generator=generator) < share for name, tensor in base.items()}
    return {name: (tensor.float() + step[name] * hit[name]).to(tensor.dtype) for name, tensor in base.items()}


@pytest.fixture
def pair(ram: Path) -> tuple[Path, Path]:
    """A base in three files and its tuned form in two, with a tokenizer and what a trainer leaves."""
    base = model(0)
    write(ram / "base", base, files=3)
    tuned = write(ram / "tuned", trained(base), files=2, eos_token_id=7)
    (tuned / "tokenizer.json").write_text('{"tuned": true}')
    (tuned / "training_args.bin").write_bytes(b"no weights")
    (tuned / "checkpoint-100").mkdir()
    (tuned / "checkpoint-100" / "trainer_state.json").write_text("{}")
    (ram / "base" / "tokenizer.json").write_text('{"tuned": false}')
    return ram / "base", tuned


def run(pair: tuple[Path, Path], out: Path, progress: Progress | None = None, **options: Any) -> dict[str, Any]:
    request = Request(*pair, out, **({"shard_bytes": 10_000, "scope": "global"} | options))
    return merge(request, progress or Progress(io.StringIO()))


def content(folder: Path) -> dict[str, bytes]:
    """Every file; of the manifest what does not tell the time."""
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    manifest = json.loads(files["dler_merge.json"])
    del manifest["provenance"]
    return files | {"dler_merge.json": json.dumps(manifest, sort_keys=True).encode()}


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_sharded_checkpoints(pair: tuple[Path, Path], ram: Path, scope: str) -> None:
    words = ["dler", "merge", "--base", str(pair[0]), "--tuned", str(pair[1]), "--scope", scope, "--keep", "0.1"]
    words += ["--scale", "0.5", "--shard-size", "10kB", "-o", str(ram / "out"), "--json", str(ram / "report.json")]
    assert main(words) == 0
    out, report = ram / "out", json.loads((ram / "report.json").read_text())
    assert equal(read(out), reference(read(pair[0]), read(pair[1]), 0.1, 0.5, scope))
    weights = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(weights) == len(report["shards_written"]) >= 4
    files = {path.name for path in out.iterdir()} - set(weights)
    assert files == {"config.json", "tokenizer.json", "model.safetensors.index.json", "dler_merge.json"}
    assert json.loads((out / "tokenizer.json").read_text()) == {"tuned": True}
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 7
    assert report["config_differences"] == ["eos_token_id"]
    said = json.loads((out / "dler_merge.json").read_text())
    assert (said["plan"]["keep"], said["plan"]["scale"], said["plan"]["scope"]) == (0.1, 0.5, scope)
    assert (said["base"], said["tuned"]) == (str(pair[0]), str(pair[1]))
    assert said["provenance"]["argv"]
    assert said["kept"] == report["kept"] <= report["changed"] < report["elements"]
    assert report["peak_rss_bytes"] > 0


def test_the_result_loads(tmp_path: Path) -> None:
    """A real model class, tied embeddings included: the merged weights are the ones that it computes with."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    base.save_pretrained(tmp_path / "tuned")
    run((tmp_path / "base", tmp_path / "tuned"), tmp_path / "out", keep=0.3)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    expected = reference(read(tmp_path / "base"), read(tmp_path / "tuned"), 0.3, 0.7, "global")
    assert equal({n: p.detach() for n, p in merged.named_parameters()}, expected)


@pytest.mark.parametrize(
    ("dtype", "kept", "config"),
    [("base", torch.bfloat16, {"torch_dtype": "bfloat16"}), ("tuned", torch.float32, {"dtype": "float32"})],
)
def test_training_in_float32(ram: Path, dtype: str, kept: Any, config: dict[str, str]) -> None:
    base = model(0)
    tuned = {name: tensor.float() + 1e-4 for name, tensor in base.items()}
    pair = write(ram / "base", base, torch_dtype="bfloat16"), write(ram / "tuned", tuned, dtype="float32")
    run(pair, ram / "out", keep=0.2, dtype=dtype)
    result = read(ram / "out")
    assert {tensor.dtype for tensor in result.values()} == {kept}
    assert equal(result, reference(base, tuned, 0.2, 0.7, "global", dtype))
    said = json.loads((ram / "out" / "config.json").read_text())
    assert {key: said[key] for key in ("dtype", "torch_dtype") if key in said} == config


def test_a_stored_copy_of_tied_embeddings_is_left_out(ram: Path) -> None:
    base = model(0)
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    tuned = trained(base)
    tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"].clone()
    without = {name: tensor for name, tensor in base.items() if name != "lm_head.weight"}
    pair = write(ram / "base", without, tie_word_embeddings=True), write(ram / "tuned", tuned, tie_word_embeddings=True)
    assert run(pair, ram / "out", keep=0.2)["tied"] == ["lm_head.weight"]
    tuned.pop("lm_head.weight")
    assert equal(read(ram / "out"), reference(without, tuned, 0.2, 0.7, "global"))


def test_tables_that_are_equal_are_copied(ram: Path) -> None:
    base = {"w": torch.zeros(8), "mask": torch.tensor([True, False]), "index": torch.arange(5)}
    tuned = base | {"w": torch.arange(8.0)}
    report = run((write(ram / "base", base), write(ram / "tuned", tuned)), ram / "out", keep=0.5, scale=1.0)
    assert report["copied"] == ["index", "mask"]
    assert equal(read(ram / "out"), base | {"w": torch.tensor([0.0, 0, 0, 0, 4, 5, 6, 7])})


# Merges again and again, each time into a new folder and killed at the next file operation, until one is not.
KILLED_EVERYWHERE = """
import os, signal, sys
from pathlib import Path
from vllm_dler.merge.run import Request, merge
from vllm_suite.checkpoints.progress import Progress
import safetensors, numpy  # before the fork

base, tuned, root = map(Path, sys.argv[1:])
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
            merge(Request(base, tuned, out, scope="global", shard_bytes=30_000), Progress(quiet))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
"""


def test_killed_at_every_file_operation(pair: tuple[Path, Path], ram: Path) -> None:
    run(pair, ram / "whole", shard_bytes=30_000)
    whole = content(ram / "whole")
    files = len(list((ram / "whole").glob("*.safetensors")))
    (ram / "killed").mkdir()
    command = [sys.executable, "-c", KILLED_EVERYWHERE, *map(str, pair), str(ram / "killed")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    places = sorted((ram / "killed").iterdir(), key=lambda path: int(path.name))
    assert len(places) > 10 * files
    reused: set[int] = set()
    for place in places[:-1]:  # nothing killed the last one
        out, partial = place / "out", place / "out.partial"
        assert not out.exists() or content(out) == whole  # killed after the rename
        there = len(list(partial.glob("model-*")))
        report = run(pair, out, shard_bytes=30_000)
        assert len(report["shards_reused"]) == (there or files * (not report["shards_written"]))
        assert content(out) == whole
        assert not partial.exists()
        reused.add(there)
    assert reused == set(range(files + 1))


def test_going_on_selects_nothing_again(pair: tuple[Path, Path], ram: Path) -> None:
    class Killed(Progress):
        def wrote(self, name: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pair, ram / "out", Killed(io.StringIO()))
    stages: list[str] = []

    class Noted(Progress):
        def start(self, total: int, done: int, what: str = "") -> None:
            stages.append(what)

    assert len(run(pair, ram / "out", Noted(io.StringIO()))["shards_reused"]) == 1
    assert stages == [""]
    stages.clear()
    assert run(pair, ram / "out", Noted(io.StringIO()))["shards_written"] == []
    assert stages == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keep": 0.5}, "keep 0.25 there, 0.5 here"),
        ({"scale": 1.0}, "scale 0.7 there, 1.0 here"),
        ({"scope": "tensor"}, "scope global there, tensor here"),
        ({"dtype": "tuned"}, "dtype base there, tuned here"),
        ({"shard_bytes": 9_000}, "shard_size 10000 there, 9000 here"),
    ],
)
def test_another_merge_is_refused(pair: tuple[Path, Path], ram: Path, options: dict[str, Any], reason: str) -> None:
    run(pair, ram / "out")
    before = content(ram / "out")
    with pytest.raises(CheckpointError, match=reason):
        run(pair, ram / "out", **options)
    assert content(ram / "out") == before


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_a_changed_input_is_refused(pair: tuple[Path, Path], ram: Path, which: str) -> None:
    class Touching(Progress):
        def wrote(self, name: str) -> None:
            os.utime(next((ram / which).glob("*.safetensors")), ns=(1, 1))

    with pytest.raises(CheckpointError, match="changed while it was read"):
        run(pair, ram / "out", Touching(io.StringIO()))
    assert not (ram / "out").exists()
    with pytest.raises(CheckpointError, match=f"belongs to another merge .*{which}.* weights changed"):
        run(pair, ram / "out")


def test_a_merge_of_a_merge_has_its_own_account(pair: tuple[Path, Path], ram: Path) -> None:
    run(pair, ram / "once")
    run((pair[0], ram / "once"), ram / "twice", keep=0.5)
    assert json.loads((ram / "twice" / "dler_merge.json").read_text())["tuned"] == str(ram / "once")


def test_what_reads_back_wrong_is_no_result(pair: tuple[Path, Path], ram: Path) -> None:
    class Damaging(Progress):
        def wrote(self, name: str) -> None:
            path = ram / "out.partial" / name
            data = bytearray(path.read_bytes())
            data[8 + int.from_bytes(data[:8], "little")] ^= 1  # the first byte of the first tensor
            path.write_bytes(data)

    with pytest.raises(ReadBackError, match="is not what was merged"):
        run(pair, ram / "out", Damaging(io.StringIO()))
    assert not (ram / "out").exists()


def test_a_full_disk(pair: tuple[Path, Path], ram: Path) -> None:
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (7000, resource.RLIM_INFINITY))\n"
        "from vllm_suite.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["dler", "merge", "--base", str(pair[0]), "--tuned", str(pair[1]), "-o", str(ram / "out")]
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "make room and run the same command again" in done.stderr.splitlines()[-1]
    assert not (ram / "out").exists()
    assert main(words) == 0


def test_peak_memory_does_not_grow_with_the_checkpoint(ram: Path) -> None:
    """Sparse files of zeros and, by their last bytes, one update: 640 MiB against 64 kiB."""

    def peak(count: int, width: int) -> int:
        shapes = {f"model.layers.{i}.weight": [width, 4096] for i in range(count)}
        for name, last in (("base", 0), ("tuned", 0x3F80)):
            folder = ram / f"{count}" / name
            folder.mkdir(parents=True)
            (folder / "config.json").write_text('{"model_type": "llama"}')
            size = width * 8192
            header = {
                tensor: {"dtype": "BF16", "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
                for i, (tensor, shape) in enumerate(shapes.items())
            }
            text = json.dumps(header).encode()
            with (folder / "model.safetensors").open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(8 + len(text) + count * size)
                file.seek(-2, os.SEEK_END)
                file.write(last.to_bytes(2, "little"))
        command = [sys.executable, "-m", "vllm_suite.cli.main", "dler", "merge", "--scope", "global"]
        command += ["--base", str(ram / f"{count}" / "base"), "--tuned", str(ram / f"{count}" / "tuned")]
        command += ["-o", str(ram / f"{count}" / "out"), "--json", str(ram / "report.json"), "--shard-size", "40MiB"]
        subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        shutil.rmtree(ram / f"{count}")
        return int(json.loads((ram / "report.json").read_text())["peak_rss_bytes"])

    small, large = peak(1, 1), peak(4, 8192)
    print(f"{(large - small) / MIB:.1f} MiB beyond the {small / MIB:.1f} MiB of a tiny one")
    assert large - small < 24 * MIB


def test_interrupted_by_the_keyboard(pair: tuple[Path, Path], ram: Path) -> None:
    """The signal that a terminal sends: status 130 and a partial folder to go on from."""
    code = (
        "import os, signal, sys\nfrom vllm_suite.checkpoints.progress import Progress\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs inherit it ignored
        "Progress.wrote = lambda self, name: os.kill(os.getpid(), signal.SIGINT)\n"
        "from vllm_suite.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["dler", "merge", "--base", str(pair[0]), "--tuned", str(pair[1]), "-o", str(ram / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--shard-size", "10kB"], capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGINT
    assert "the same command goes on from here" in done.stderr
    assert (ram / "out.partial").is_dir()


def test_help_imports_no_heavy_library_and_a_merge_no_torch(pair: tuple[Path, Path], ram: Path) -> None:
    code = (
        "import atexit, sys; from vllm_suite.cli.main import main;"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr)); main(['dler', 'merge', *sys.argv[1:]])"
    )
    words = ["--base", str(pair[0]), "--tuned", str(pair[1]), "-o", str(ram / "out")]
    for given, absent in ((["--help"], {"torch", "vllm", "numpy", "safetensors", "rich"}), (words, {"torch", "vllm"})):
        command = [sys.executable, "-c", code, *given]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert not absent & set(done.stderr.split())
