"""Where lm-evaluation-harness is: this environment, or the one that `make setup` puts on top of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

REASON = "lm-evaluation-harness is not installed; run `make setup`, or pip install 'vllm-suite[eval]'"


def _python() -> Path | None:
    if importlib.util.find_spec("lm_eval") is not None:
        return Path(sys.executable)
    beside = Path(sys.prefix) / "eval" / "bin" / "python"
    return beside if beside.exists() else None


PYTHON = _python()
