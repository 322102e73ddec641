"""The rates of `benchmarks/bench_roles.py`, in a process of its own: it puts folders of tests on the path."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"

RATES = """
import json
from bench_roles import rates_of
held = {"prefill-heavy": 8.0, "decode-heavy": 4.0}
fixed = [(None, None), (None, 9.0), (2.0, 9.0)]
print(json.dumps([rates_of(held, 1.5, {"prefill-heavy": first, "decode-heavy": second}) for first, second in fixed]))
"""


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=BENCHMARKS, capture_output=True, text=True, timeout=120)


def test_a_rate_is_measured_or_fixed() -> None:
    done = python("-c", RATES)
    assert done.returncode == 0, done.stderr
    rates = [(one["prefill-heavy"], one["decode-heavy"]) for one in json.loads(done.stdout)]
    # Two prefill, and one alone is not to hold the first mix.
    assert rates == [(6.0, 6.0), (6.0, 9.0), (2.0, 9.0)]


def test_a_rate_that_is_none_is_refused() -> None:
    done = python("bench_roles.py", "--rate", "0", "--help")  # which keeps it from running in any case
    assert done.returncode == 2
    assert "argument --rate: 0 is no number of requests a second above 0" in done.stderr
