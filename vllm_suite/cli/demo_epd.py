"""`vllm-suite demo-epd`: encode, prefill and decode on instances of their own, proven equal to one engine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "send pictures to 2 encoders + 1 prefill + 1 decode + router and compare the answers with one engine's"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--model", help="multimodal checkpoint folder or hub name (default: a tiny Qwen2.5-VL, made here offline)"
    )
    parser.add_argument("--max-tokens", type=_positive, default=16, metavar="N", help="output tokens of each (16)")
    parser.add_argument(
        "--pictures", type=_positive, default=8, metavar="N", help="pictures in the request that is timed (8)"
    )
    parser.add_argument(
        "--rounds", type=_positive, default=4, metavar="N", help="times it is sent with 1 and with 2 encoders (4)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the pictures, the words and the model (0)")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("build/demo-epd"),
        metavar="DIR",
        help="model, logs, report (build/demo-epd)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the report (default: report.json in --folder)")


def run(args: argparse.Namespace) -> int:
    """0 only where all outputs are identical and every picture was encoded once, on an encoder."""
    from vllm_suite.fleet import demo_epd
    from vllm_suite.fleet.demo_epd_spec import EpdOptions

    options = EpdOptions(
        model=args.model,
        max_tokens=args.max_tokens,
        pictures=args.pictures,
        rounds=args.rounds,
        seed=args.seed,
        folder=args.folder,
    )
    return demo_epd.run(options, args.json or args.folder / "report.json", sys.argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
