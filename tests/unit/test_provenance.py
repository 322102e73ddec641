"""Facts stored beside every result."""

from __future__ import annotations

import json
import subprocess
import sys

from vllm_suite import __version__
from vllm_suite.provenance import installed, provenance


def test_facts_are_json_and_complete() -> None:
    facts = provenance(["bench", "--x"], seed=7)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["argv"] == ["bench", "--x"]
    assert facts["seed"] == 7
    assert facts["versions"]["suite"] == __version__
    assert facts["cpu_count"] >= 1
    assert facts["device"]
    assert facts["time"].endswith("+00:00")
    assert facts["commit"] is None or len(facts["commit"].removesuffix("+dirty")) == 40


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from vllm_suite.provenance import provenance; provenance();"
        "sys.exit(bool({'torch', 'vllm', 'nixl'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_the_first_installed_name_counts() -> None:
    assert installed("no-such-distribution", "pytest") == installed("pytest")
    assert installed("no-such-distribution") is None
