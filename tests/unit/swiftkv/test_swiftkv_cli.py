"""`vllm-suite swiftkv`: the table of verbs, and what is imported for which."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_suite.cli import swiftkv as cli
from vllm_suite.cli.main import main


def imported(*words: str) -> tuple[str, set[str]]:
    """What `vllm-suite swiftkv *words` prints, and the modules that it has imported by its end."""
    code = (
        "import atexit, sys; from vllm_suite.cli.main import main;"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr)); main(['swiftkv', *sys.argv[1:]])"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, set(done.stderr.split())


def test_help_lists_the_verbs_and_imports_none_of_them() -> None:
    text, modules = imported("--help")
    assert all(f"  {verb} " in text for verb in cli.VERBS)
    assert "vllm_suite.cli.subverbs" in modules
    assert not modules & {module for module, _ in cli.VERBS.values()}


def test_help_of_a_verb_imports_no_other_and_no_heavy_library() -> None:
    text, modules = imported("convert", "--help")
    assert "usage: vllm-suite swiftkv convert" in text
    assert "(L - l) /" in text
    assert modules & {module for module, _ in cli.VERBS.values()} == {"vllm_swiftkv.convert.cli"}
    assert not modules & {"torch", "vllm", "transformers", "numpy", "safetensors", "rich"}


@pytest.mark.parametrize("words", [[], ["nonsense"], ["convert"], ["convert", "--nonsense"], ["--nonsense"]])
def test_bad_arguments_exit_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["swiftkv", *words])
    assert end.value.code == 2


def test_a_verb_whose_module_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cli.VERBS, "later", ("vllm_swiftkv.later.cli", "not written yet"))
    assert main(["swiftkv", "later", "--some", "thing"]) == 2
    assert "swiftkv later: error: not part of this version" in capsys.readouterr().err
    # What a verb itself cannot import is no missing verb.
    monkeypatch.setitem(sys.modules, "vllm_swiftkv.families", None)
    monkeypatch.delitem(sys.modules, "vllm_swiftkv.convert.cli", raising=False)
    with pytest.raises(ModuleNotFoundError, match="families"):
        main(["swiftkv", "convert"])


def test_the_report(checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, result = tmp_path / "out", tmp_path / "reports" / "convert.json"
    words = ["--model", str(checkpoint("qwen2")), "--cut-layer", "4", "--group", "2", "-o", str(out)]
    assert main(["swiftkv", "convert", *words, "--json", str(result)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}: Qwen2SwiftKVForCausalLM, 92 tensors, 4.90 MiB\n"
    assert "0-3 keep their own keys and values (num_key_value_layers 4), 4-7 take theirs from layer 3's" in printed.err
    assert "model-00001-of-00001.safetensors written; 4.90 MiB of 4.90 MiB" in printed.err
    report = json.loads(result.read_text())
    assert report["ok"] is True
    assert report["skip"] == 0.5
    assert (report["num_key_value_layers"], report["key_value_group_size"]) == (4, 2)
    assert report["provenance"]["versions"]["suite"]
    assert len(report["initialised"]) == 1 + 2 * (4 + 2 * 2)
    assert report["verified"]["tensors"] == report["tensors"] == 92


def test_a_terminal_shows_a_bar(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    code = (
        "import pty, sys; sys.exit(pty.spawn([sys.executable, '-m', 'vllm_suite.cli.main', 'swiftkv', 'convert', "
        "'--model', sys.argv[1], '--cut', '0.5', '-o', sys.argv[2]]) >> 8)"
    )
    command = [sys.executable, "-c", code, str(checkpoint("llama")), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout
    assert "━" in done.stdout
    assert "written;" not in done.stdout
    assert "verified: " in done.stdout
