"""Arguments of `vllm-suite plan` that say nothing, or nothing together: found before anything is simulated."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path


class InputError(ValueError):
    """An argument that cannot be used. `KINDS` are all errors that bad input raises, filled in by `question`."""

    KINDS: tuple[type[Exception], ...] = ()


def check(args: argparse.Namespace) -> None:
    """Raises InputError with the option, what it was and what to do."""
    for reason in (*_numbers(args), *_targets(args), *_workload(args), *_search(args), *_watch(args), *_files(args)):
        raise InputError(reason)


def _numbers(args: argparse.Namespace) -> Iterator[str]:
    for name, value, least in (("--isl", args.isl, 1), ("--osl", args.osl, 1)):
        if value is not None and not (math.isfinite(value) and value >= least):
            yield f"{name} is mean tokens, at least {least}, not {value:g}"
    for name, value in (("--cv", args.cv), ("--arrival-cv", args.arrival_cv)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            yield f"{name} is a deviation over a mean, at least 0, not {value:g}"
    if args.rate is not None and not (math.isfinite(args.rate) and args.rate > 0):
        yield f"--rate is requests per second above 0, not {args.rate:g}"
    if not 0 < args.attainment < 1:
        yield f"--attainment is a share above 0 and below 1, for example 0.9, not {args.attainment:g}"
    if args.requests < 100:
        yield f"--requests {args.requests}: fewer than 100 say nothing about a share of requests"
    for name, count, least in (("--images", args.images, 0), ("--processes", args.processes, 1),
                               ("--seed", args.seed, 0), ("--max-model-len", args.max_model_len, 2),
                               ("--watch-looks", args.watch_looks, 1)):  # fmt: skip
        if count is not None and count < least:
            yield f"{name} is a whole number, at least {least}, not {count}"


def _targets(args: argparse.Namespace) -> Iterator[str]:
    if args.ttft is None and args.tpot is None:
        yield "give a target: --ttft, --tpot or both, for example --ttft 300ms --tpot 30ms"
    elif args.ttft is None:
        yield "--tpot alone lets requests wait for their first token without end: give --ttft too, such as 10s"
    elif args.tpot is None and args.placement is not None:
        yield "--placement: DistServe's algorithms need both targets: give --tpot too"


def _workload(args: argparse.Namespace) -> Iterator[str]:
    if args.trace is not None:
        if args.isl is not None or args.osl is not None or args.images:
            yield "--trace has lengths of its own: leave --isl, --osl and --images"
        for name, value in (("--cv", args.cv), ("--arrival-cv", args.arrival_cv)):
            if value is not None:
                yield f"--trace has lengths and arrivals of its own: leave {name}"
        return
    if args.isl is None or args.osl is None:
        yield "give --trace FILE, or mean lengths: --isl and --osl in tokens"
    if args.format is not None:
        yield "--format is of a trace: give --trace FILE, or leave it"
    if args.image_size is not None and not args.images:
        yield "--image-size is of pictures: say how many a request has, --images N"


def _search(args: argparse.Namespace) -> Iterator[str]:
    if args.method == "optuna":
        if find_spec("optuna") is None:
            yield "--method optuna needs Optuna: pip install 'vllm-suite[search]'"
        if args.state is not None:
            yield "--state is kept by --method bounds and exhaustive; optuna starts anew each time"
        if args.placement is not None:
            yield "--placement leaves nothing to sample: leave --method optuna"
    if args.placement is not None:
        kinds = [word.partition("=")[2].split(",") for word in args.space if word.startswith("kinds=")]
        if kinds and not {"pd", "prefill+decode"} & set(kinds[-1]):
            yield f"--placement chooses a plan with prefill and decode; --space kinds={','.join(kinds[-1])} has none"


def _watch(args: argparse.Namespace) -> Iterator[str]:
    watching = args.watch is not None or args.watch_file is not None
    given = {"--watch-selector": args.watch_selector, "--watch-record": args.watch_record,
             "--watch-looks": args.watch_looks, "--watch-window": args.watch_window,
             "--watch-metrics-port": args.watch_metrics_port}  # fmt: skip
    for name, value in given.items():
        if value not in (None, "") and not watching:
            yield f"{name} goes with --watch URL or --watch-file FILE"
    if args.watch_file is not None and args.watch_selector:
        yield "--watch-selector is for --watch: a recorded file has the windows of one selection"
    if args.watch_file is not None and args.watch_window:
        yield "--watch-window is for --watch: a recorded file has windows of one length"
    if args.watch_metrics_port is not None and not 0 <= args.watch_metrics_port < 65_536:
        yield f"--watch-metrics-port is a port, at most 65535, not {args.watch_metrics_port}"
    if args.watch is not None and not args.watch.startswith(("http://", "https://")):
        yield f"--watch is the URL of a Prometheus server, such as http://{args.watch}, not {args.watch}"
    if watching and args.images:
        yield "a server's metrics do not say what items requests have: watch without --images"


def _files(args: argparse.Namespace) -> Iterator[str]:
    """Outputs that cannot be written."""
    outputs: dict[Path, str] = {}
    read = {path.resolve(): name for name, path in (("--trace", args.trace), ("--watch-file", args.watch_file),
                                                    ("--hardware", args.hardware)) if path is not None}  # fmt: skip
    for name, path in (("-o", args.output), ("--json", args.json), ("--html", args.html),
                       ("--timeline", args.timeline), ("--state", args.state),
                       ("--watch-record", args.watch_record)):  # fmt: skip
        if path is None:
            continue
        whole = path.resolve()
        if whole.is_dir():
            yield f"{name} {path}: is a folder; name a file in it"
        if not whole.parent.is_dir():
            yield f"{name} {path}: there is no folder {whole.parent}"
        if whole in read:
            yield f"{name} {path}: would overwrite the file of {read[whole]}"
        if whole in outputs:
            yield f"{name} {path}: {outputs[whole]} names the same file"
        outputs[whole] = name
    if args.html is not None and find_spec("matplotlib") is None:
        yield "--html needs matplotlib for its pictures: pip install 'vllm-suite[pictures]'"
