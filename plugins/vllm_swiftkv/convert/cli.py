"""`vllm-suite swiftkv convert`: arguments only."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_swiftkv.families import FAMILIES, SwiftKVError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    families = ", ".join(family.base_model_type for family in FAMILIES)
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help=f"folder of an ordinary checkpoint ({families})"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--cut",
        type=float,
        metavar="SHARE",
        help="share of the layers that prompt tokens skip, (L - l) / L: 0.5 of 32 layers skips the last 16. Rounded "
        "to the nearest number of layers that --group divides, of two equally near ones to the smaller",
    )
    where.add_argument(
        "--cut-layer",
        type=int,
        metavar="N",
        help="in place of --cut: the first N layers keep their own keys and values (num_key_value_layers)",
    )
    parser.add_argument(
        "--group",
        type=int,
        default=1,
        metavar="G",
        help="skipped layers that share one KV cache (AcrossKV); must divide their number (1)",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="a new or empty folder")
    parser.add_argument(
        "--keep-teacher",
        action="store_true",
        help="keep the skipped layers' own q, k and v beside the new ones; serving never loads them",
    )
    parser.add_argument(
        "--shard-size", type=_size, default="4GiB", metavar="SIZE", help="of a weight file, such as 500MB (4GiB)"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not read the result back")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")


def run(args: argparse.Namespace) -> int:
    """0 where ``OUT`` is a complete, verified checkpoint; 1 where what was written reads back wrong, else 2."""
    from vllm_suite.checkpoints.progress import Progress, human
    from vllm_suite.provenance import write_report
    from vllm_swiftkv.convert.run import Request, convert
    from vllm_swiftkv.convert.verify import VerificationError

    request = Request(
        model=args.model,
        out=args.output,
        cut=args.cut,
        cut_layer=args.cut_layer,
        group=args.group,
        keep_teacher=args.keep_teacher,
        shard_bytes=args.shard_size,
        verify=not args.no_verify,
    )
    try:
        with Progress() as progress:
            report = convert(request, progress)
        if args.json is not None:
            write_report(args.json, report)
    except (SwiftKVError, OSError) as error:
        sys.stderr.write(f"vllm-suite swiftkv convert: error: {error}\n")
        return 1 if isinstance(error, VerificationError) else 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on from here\n")
        raise
    print(f"{args.output}: {report['architecture']}, {report['tensors']} tensors, {human(report['bytes'])}")
    return 0


def _size(text: str) -> int:
    from vllm_suite.checkpoints.shards import size_in_bytes

    try:
        return size_in_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
