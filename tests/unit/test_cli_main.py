"""The `vllm-suite` command: verbs are found by name and only the chosen one is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm_suite import __version__
from vllm_suite.cli.main import VERBS, main


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_suite.cli.main", *argv], capture_output=True, text=True, timeout=60, check=False
    )


def test_help_lists_every_verb() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_a_machine_readable_result_or_serves(verb: str) -> None:
    done = run(verb, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: vllm-suite {verb}")


def test_bad_arguments_exit_with_2() -> None:
    assert run().returncode == 2
    assert run("nonsense").returncode == 2
    assert run("doctor", "--nonsense").returncode == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.strip() == f"vllm-suite {__version__}"


def test_only_the_chosen_verb_is_imported() -> None:
    code = (
        "import sys; from vllm_suite.cli.main import build_parser; build_parser(['doctor']);"
        "print(sorted(m for m in sys.modules if m.startswith('vllm_suite.cli.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "['vllm_suite.cli.doctor', 'vllm_suite.cli.main']"
