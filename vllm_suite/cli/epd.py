"""`vllm-suite epd`: the tools of the encoder-stage plugin, found by name because the suite imports no plugin."""

from __future__ import annotations

import argparse
import importlib
from typing import cast

HELP = "sizes of encoder, prefill and monolithic instances"
_MODULE = "vllm_epd.cli"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    importlib.import_module(_MODULE).add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """What the chosen verb returns."""
    return cast(int, importlib.import_module(_MODULE).run(args))
