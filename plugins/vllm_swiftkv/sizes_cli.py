"""`vllm-suite swiftkv sizes`: arguments and the table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from vllm_swiftkv.families import SwiftKVError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", type=Path, required=True, metavar="PATH", help="a checkpoint, or its config.json")
    parser.add_argument("--cut", type=float, metavar="SHARE", help="share of the layers that prompt tokens skip (0.5)")
    parser.add_argument("--group", type=int, metavar="G", help="layers that share one KV cache (1)")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16", "fp8"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")


def run(args: argparse.Namespace) -> int:
    """Print the table; 2 where the model has no SwiftKV form or cannot be read."""
    from rich.console import Console
    from rich.table import Table

    from vllm_suite.provenance import provenance
    from vllm_swiftkv.sizes import BYTES, sizes, split_of

    path = args.model / "config.json" if args.model.is_dir() else args.model
    try:
        config = json.loads(path.read_text())
        found = sizes(config, *split_of(config, args.cut, args.group))
    except (OSError, ValueError) as error:
        what = error if isinstance(error, SwiftKVError | OSError) else f"{path}: {error}"
        sys.stderr.write(f"vllm-suite swiftkv sizes: error: {what}\n")
        return 2
    width = BYTES[args.dtype]
    title = f"layers {found.split.layers}, cut {found.split.cut}, group {found.split.group}, {args.dtype}"
    table = Table("instance", "parameters", "GB", "of ordinary", "KV bytes per token", title=title)
    for name, count, kv in (
        ("ordinary", found.ordinary, found.kv_ordinary),
        ("SwiftKV with teacher weights", found.with_teacher, found.kv_swiftkv),
        ("SwiftKV", found.swiftkv, found.kv_swiftkv),
        ("SwiftKV, prefill only", found.prefill_only, found.kv_swiftkv),
    ):
        share = f"{count / found.ordinary:.1%}"
        table.add_row(name, f"{count:,}", f"{count * width / 1e9:.2f}", share, f"{kv * width:,}")
    Console().print(table)
    if args.json:
        numbers = dataclasses.asdict(found) | {"dtype": args.dtype, "bytes_per_value": width}
        args.json.write_text(json.dumps(numbers | provenance(), indent=1) + "\n")
    return 0
