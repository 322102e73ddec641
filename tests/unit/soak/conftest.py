"""The benchmarks are scripts beside each other; these tests import them."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = str(Path(__file__).resolve().parents[3] / "benchmarks")
if FOLDER not in sys.path:
    sys.path.insert(0, FOLDER)
