"""``vllm-suite swiftkv distill``: arguments only. Each setting of ``DistillConfig`` is a flag and a key of the file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from vllm_swiftkv.distill.config import DistillConfig, read
from vllm_swiftkv.families import SwiftKVError

_SHORT = {"output": ["-o"]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = "On several GPUs: accelerate launch -m vllm_suite.cli.main swiftkv distill ..."
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of these settings; flags win over it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    for name, field in DistillConfig.model_fields.items():
        flag, default = "--" + name.replace("_", "-"), field.get_default()
        told = "" if field.is_required() or default in (None, []) else f" (default: {_text(default)})"
        options: dict[str, Any] = {
            "dest": f"set_{name}",
            "default": argparse.SUPPRESS,
            "help": f"{field.description}{told}".replace("%", "%%"),
        }
        if field.annotation is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
            continue
        if isinstance(default, (list, tuple)) or name == "data":
            options["nargs"] = "+"
        parser.add_argument(flag, *_SHORT.get(name, []), metavar=name.upper(), **options)


def run(args: argparse.Namespace) -> int:
    """0 where the output is a trained checkpoint, 2 for bad settings or data, 1 where the run itself fails."""
    flags = {name.removeprefix("set_"): value for name, value in vars(args).items() if name.startswith("set_")}
    try:
        config = read(args.config, flags)
        try:
            from vllm_swiftkv.distill.train import distill
        except ModuleNotFoundError as error:
            raise SwiftKVError(f"{error}: install what training needs, pip install 'vllm-suite[train]'") from error
        report = distill(config)
    except SwiftKVError as error:
        sys.stderr.write(f"vllm-suite swiftkv distill: error: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(
            f"vllm-suite swiftkv distill: error: {error}; go on with --resume once there is a checkpoint\n"
        )
        return 1
    return _tell(report, args.json, config.seed)


def _tell(report: dict[str, Any], file: Path | None, seed: int) -> int:
    import torch

    from vllm_suite.provenance import write_report

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        main = torch.distributed.get_rank() == 0
        torch.distributed.destroy_process_group()
        if not main:
            return 0
    if file is not None:
        write_report(file, report, seed, ("transformers", "accelerate"))
    if "prepared" in report:
        print(f"{report['documents']} documents in {report['rows']} rows prepared in {report['prepared']}")
        return 0
    before, after, closed = report["before"], report["after"], report["gap_closed"]
    print(f"held-out loss: teacher {before['teacher']:.4f}, student {before['student']:.4f} -> {after['student']:.4f}")
    print("gap closed: " + ("none to close" if closed is None else f"{closed:.1%}"))
    print(f"{report['output']}: ready to serve")
    return 0


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
