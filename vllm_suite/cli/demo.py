"""`vllm-suite demo`: text and pictures through prefill and decode on two engines, proven equal to one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "replay a trace and pictures on 1 prefill + 1 decode + router and compare with one engine, token by token"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", help="checkpoint folder or hub name (default: a tiny one, made here offline)")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="Azure .csv or Mooncake .jsonl, also .gz (default: see docs/fleet.md)",
    )
    parser.add_argument("--requests", type=_positive, default=48, metavar="N", help="requests to replay (48)")
    parser.add_argument("--max-tokens", type=_positive, default=32, metavar="N", help="output tokens of each (32)")
    parser.add_argument(
        "--duration", type=_positive, default=20, metavar="S", help="seconds in which all requests arrive (20)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and of the synthetic trace (0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "auto"), help="in place of the default")
    parser.add_argument("--max-model-len", type=_positive, metavar="N", help="window in tokens")
    parser.add_argument(
        "--no-batch-invariant", action="store_true", help="on GPU: leave vLLM's batch-invariant kernels off"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("build/demo"), metavar="DIR", help="model, logs and report (build/demo)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the report (default: report.json in --folder)")


def run(args: argparse.Namespace) -> int:
    """0 only where all outputs are identical and KV blocks moved through NIXL."""
    from vllm_suite.fleet import demo
    from vllm_suite.fleet.demo_spec import DemoOptions

    options = DemoOptions(
        model=args.model,
        trace=args.trace,
        requests=args.requests,
        max_tokens=args.max_tokens,
        duration_s=float(args.duration),
        seed=args.seed,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        batch_invariant=not args.no_batch_invariant,
        folder=args.folder,
    )
    return demo.run(options, args.json or args.folder / "report.json", sys.argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
