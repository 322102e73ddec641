"""`vllm-suite calibrate`: measure a real engine's steps on this machine for the planner."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from vllm_suite.planner.calibrate.file import Calibration
    from vllm_suite.planner.calibrate.fleets import Kind
    from vllm_suite.planner.calibrate.measure import Options

HELP = "measure how long a real vLLM engine's steps take here, fit a model, and say how far it is off"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the calibration: .yaml or .json"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: gpu where a driver answers"
    )
    parser.add_argument("--tp", type=_positive, metavar="N", help="tensor_parallel_size")
    parser.add_argument("--pp", type=_positive, metavar="N", help="pipeline_parallel_size")
    parser.add_argument("--dtype", help="of weights and activations")
    parser.add_argument("--max-num-seqs", type=_positive, metavar="N")
    parser.add_argument("--max-num-batched-tokens", type=_positive, metavar="N")
    parser.add_argument("--max-model-len", type=_positive, metavar="N")
    parser.add_argument(
        "--engine-args", type=_arguments, default={}, metavar="JSON", help="vLLM's other arguments by name"
    )
    parser.add_argument(
        "--engines", type=_positive, default=1, metavar="N",
        help="engines on this machine: each batch is measured with one at work, and again with all (1)",
    )  # fmt: skip
    parser.add_argument(
        "--served", nargs="+", choices=("colocated", "disaggregated"), default=(), metavar="FLEET",
        help="also what a request sees beside the steps: in `colocated` (--engines alike behind the router),"
        " in `disaggregated` (one prefills, one decodes, NIXL between them)",
    )  # fmt: skip
    parser.add_argument("--threads", type=_positive, default=1, metavar="N", help="of each engine, on CPU (1)")
    parser.add_argument("--seconds", type=float, default=180.0, metavar="S", help="for the grid, in each phase (180)")
    parser.add_argument("--dense", type=float, default=1.0, metavar="X", help="grid points per factor of two (1)")
    parser.add_argument("--folds", type=_folds, default=5, metavar="K", help="of the cross-validation (5)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of batches, the prompts and the folds (0)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep the engines' logs there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same as --output, as JSON")


def run(args: argparse.Namespace) -> int:
    """0 where a file was written, 1 where the engine failed or too little was measured."""
    from vllm_suite.fleet.devices import visible_gpus
    from vllm_suite.fleet.process import PortTaken
    from vllm_suite.fleet.supervisor import StartFailed
    from vllm_suite.planner.calibrate.client import ServedError
    from vllm_suite.planner.calibrate.engines import EngineFailed
    from vllm_suite.planner.calibrate.measure import Options, calibrate, show
    from vllm_suite.planner.sources.base import SourceError

    device: Literal["cpu", "gpu"] = "gpu" if args.device == "gpu" else "cpu"
    if args.device == "auto" and visible_gpus():
        device = "gpu"
    options = Options(
        model=args.model,
        device=device,
        engine=_engine(args),
        engines=args.engines,
        threads=args.threads,
        seconds=args.seconds,
        dense=args.dense,
        seed=args.seed,
        folds=args.folds,
        folder=args.folder,
    )
    try:
        found = calibrate(options, _say)
        if args.served:
            found = _served(found, options, args.served)
        for path in filter(None, (args.output, args.json)):
            found.save(path)
    except (EngineFailed, ServedError, StartFailed, PortTaken, SourceError, ValueError, OSError) as error:
        print(f"vllm-suite calibrate: {error}", file=sys.stderr)
        return 1
    print(show(found))
    print(f"wrote {args.output}")
    return 0


def _served(found: Calibration, options: Options, kinds: list[Kind]) -> Calibration:
    import asyncio
    import tempfile

    from vllm_suite.fleet.keeper import adopt_orphans
    from vllm_suite.planner.calibrate.serving import served

    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="calibrate-") as folder:
        return asyncio.run(served(found, options, kinds, options.folder or Path(folder), _say))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _engine(args: argparse.Namespace) -> dict[str, Any]:
    named = {
        "tensor_parallel_size": args.tp,
        "pipeline_parallel_size": args.pp,
        "dtype": args.dtype,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "max_model_len": args.max_model_len,
    }
    return {**args.engine_args, **{name: value for name, value in named.items() if value is not None}}


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _folds(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError("must be at least 2")
    return number


def _arguments(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError('must be an object, for example {"block_size": 32}')
    return found
