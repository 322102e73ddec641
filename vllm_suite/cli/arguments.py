"""Kinds of arguments that several verbs take."""

from __future__ import annotations

import argparse
import math
from pathlib import Path


def seconds(text: str) -> float:
    """A positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds")
    return value


def base_url(text: str) -> str:
    """An address with its scheme; without a slash at the end."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment)
    except ValueError:
        good = False
    if not good:
        raise argparse.ArgumentTypeError(f"{text!r} is no address like http://HOST:PORT")
    return text.rstrip("/")


def add_log_dir(parser: argparse.ArgumentParser) -> None:
    """Where the state of a fleet on this machine stands."""
    parser.add_argument(
        "--log-dir",
        type=Path,
        metavar="DIR",
        default=Path("build/fleet"),
        help="local.log_dir of a fleet on this machine (build/fleet)",
    )


def add_fleet_arguments(parser: argparse.ArgumentParser) -> None:
    """Which fleet."""
    parser.add_argument("--url", type=base_url, help="the router (default: that of the fleet in --log-dir)")
    add_log_dir(parser)
