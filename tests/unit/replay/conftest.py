"""The benchmarks are scripts beside each other; these tests import them, and what the planner's tests share."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

for folder in (HERE.parents[2] / "benchmarks", HERE.parent / "planner", HERE):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
