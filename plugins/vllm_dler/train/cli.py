"""``vllm-suite dler train``: arguments only. Each setting of ``DLERConfig`` is a flag and a key of the file."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from vllm_dler.train.config import DLERConfig, read
from vllm_dler.train.grading import TrainError

_SHORT = {"output": ["-o"]}
_STRUCTURED = frozenset({"tiers", "trl"})
_NEEDED = ("trl", "datasets", "accelerate")
_INSTALL = "install what training needs, pip install 'vllm-suite[train]', or run `make setup`"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = "On several GPUs: accelerate launch -m vllm_suite.cli.main dler train CONFIG ..."
    parser.add_argument("config", type=Path, nargs="?", help="YAML file of the settings below; flags win over it")
    parser.add_argument(
        "--emit", choices=("verl", "openrlhf"), help="write the same run as settings of this trainer, and stop"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    for name, field in DLERConfig.model_fields.items():
        flag, default = "--" + name.replace("_", "-"), field.get_default()
        told = "" if field.is_required() or default in (None, [], {}, "") else f" (default: {default})"
        if name == "output":
            told = "; with --emit: the file to write (default: standard output)"
        options: dict[str, Any] = {
            "dest": f"set_{name}",
            "default": argparse.SUPPRESS,
            "help": f"{field.description}{told}".replace("%", "%%"),
        }
        if field.annotation is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
            continue
        if name in ("data", "eval_data"):
            options["nargs"] = "+"
        if name in _STRUCTURED:
            options["type"] = _structured
        parser.add_argument(flag, *_SHORT.get(name, []), metavar=name.upper(), **options)


def run(args: argparse.Namespace) -> int:
    """0 where the output is a trained checkpoint, 2 for bad settings or data, 1 where the run itself fails."""
    flags = {name.removeprefix("set_"): value for name, value in vars(args).items() if name.startswith("set_")}
    for name, value in flags.items():
        if value in ("none", "null", "None") and name != "vllm":
            flags[name] = None
    try:
        if args.emit:
            return _emit(args, flags)
        config = read(args.config, flags)
        if importlib.util.find_spec("trl") is None:
            return _elsewhere()
        try:
            from vllm_dler.train import trl_import

            trl_import.prepare(vllm=config.vllm != "none")
            from vllm_dler.train.run import train
        except ModuleNotFoundError as error:
            raise TrainError(f"{error}: {_INSTALL}") from error
        report = train(config)
    except TrainError as error:
        sys.stderr.write(f"vllm-suite dler train: error: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"vllm-suite dler train: error: {error}; go on with --resume once there is a checkpoint\n")
        return 1
    return _tell(report, args.json, config.seed)


def _elsewhere() -> int:
    """Run again in the environment that `make setup` puts beside this one. Returns only where there is none."""
    python = Path(sys.prefix) / "eval" / "bin" / "python"
    if not python.exists() or not list(python.parent.parent.glob("lib/python*/site-packages/trl/__init__.py")):
        raise TrainError(f"TRL is not installed here: {_INSTALL}")
    if sys.argv[1:3] != ["dler", "train"]:
        raise TrainError(f"TRL is not installed in {sys.prefix} but in {python.parent.parent}: run it by {python}")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(python, [str(python), "-m", "vllm_suite.cli.main", *sys.argv[1:]])


def _emit(args: argparse.Namespace, flags: dict[str, Any]) -> int:
    from vllm_dler.train.clusters import emit

    target = flags.pop("output", None)
    config = read(args.config, {**flags, "output": target or "output"})
    text = emit(config, args.emit)
    if target is None:
        print(text, end="")
        return 0
    partial = Path(f"{target}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, target)
    print(f"wrote {target}")
    return 0


def _tell(report: dict[str, Any], file: Path | None, seed: int) -> int:
    import torch

    from vllm_suite.provenance import write_report

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        main = torch.distributed.get_rank() == 0
        torch.distributed.destroy_process_group()
        if not main:
            return 0
    if file is not None:
        write_report(file, report, seed, ("transformers", *_NEEDED))
    before, after = report["before"], report["after"]
    if before and after:
        print(f"mean length: {before['length']:.1f} -> {after['length']:.1f} tokens")
        print(f"accuracy: {before['accuracy']:.1%} -> {after['accuracy']:.1%} ({after['answers']:.0f} answers)")
    print(f"{report['output']}: ready to serve")
    return 0


def _structured(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"no YAML: {error}") from error
