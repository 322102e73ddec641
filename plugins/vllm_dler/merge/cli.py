"""`vllm-suite dler merge`: arguments only."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="the checkpoint that was trained on")
    parser.add_argument("--tuned", type=Path, required=True, metavar="DIR", help="the checkpoint that training made")
    parser.add_argument(
        "--keep", type=float, default=0.25, metavar="SHARE", help="of the updates, the largest by absolute value (0.25)"
    )
    parser.add_argument("--scale", type=float, default=0.7, metavar="S", help="of the updates that are kept (0.7)")
    parser.add_argument(
        "--scope",
        choices=("tensor", "global"),
        default="tensor",
        help="whether the share is taken of each tensor or of the whole model (tensor)",
    )
    parser.add_argument(
        "--dtype",
        choices=("base", "tuned"),
        default="base",
        help="whose dtype the result has, where training kept its weights in another (base)",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="a new or empty folder")
    parser.add_argument(
        "--shard-size", type=_size, default="4GiB", metavar="SIZE", help="of a weight file, such as 500MB (4GiB)"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not read the result back")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")


def run(args: argparse.Namespace) -> int:
    """0 where ``OUT`` is a complete checkpoint; 1 where what was written reads back wrong, else 2."""
    from vllm_dler.merge.run import ReadBackError, Request, merge
    from vllm_suite.checkpoints.progress import Progress, human
    from vllm_suite.checkpoints.source import CheckpointError
    from vllm_suite.provenance import write_report

    request = Request(
        base=args.base,
        tuned=args.tuned,
        out=args.output,
        keep=args.keep,
        scale=args.scale,
        scope=args.scope,
        dtype=args.dtype,
        shard_bytes=args.shard_size,
        verify=not args.no_verify,
    )
    try:
        with Progress() as progress:
            report = merge(request, progress)
        if args.json is not None:
            write_report(args.json, report)
    except (CheckpointError, OSError) as error:
        sys.stderr.write(f"vllm-suite dler merge: error: {error}\n")
        return 1 if isinstance(error, ReadBackError) else 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on from here\n")
        raise
    print(
        f"{args.output}: {report['tensors']} tensors, {human(report['bytes'])}; {report['kept']} of "
        f"{report['elements']} weights updated ({report['kept'] / report['elements']:.1%}), "
        f"training changed {report['changed'] / report['elements']:.1%}"
    )
    return 0


def _size(text: str) -> int:
    from vllm_suite.checkpoints.shards import size_in_bytes

    try:
        return size_in_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
