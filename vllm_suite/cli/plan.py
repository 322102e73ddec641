"""`vllm-suite plan`: how many accelerators do what, for a model, a workload and targets."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "find the fleet that serves a workload within its targets, by simulation"

_USAGE = """vllm-suite plan --model M --gpus NxDEVICE (--trace FILE | --isl TOKENS --osl TOKENS) --ttft TIME
                       [--tpot TIME] [--rate R] [-o FLEET.yaml] [more options, see --help]"""

_EPILOG = """lengths and arrivals come from --trace, or from --isl and --osl; durations are written as in fleet
files, 300ms or 1.5s. Exit status: 0 for a plan that meets the targets, 1 where there is none, 2 for bad input.
See docs/planner/plan.md."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.usage, parser.epilog = _USAGE, _EPILOG
    group = parser.add_argument_group("what is served, on what")
    group.add_argument(
        "--model", required=True, metavar="M", help="a known name, a checkpoint folder or its config.json"
    )
    group.add_argument("--gpus", required=True, metavar="NxDEVICE", help="for example 8xH200")
    group.add_argument("--hardware", type=Path, metavar="FILE", help="YAML of devices of your own")
    group = parser.add_argument_group("the workload")
    group.add_argument("--trace", type=Path, metavar="FILE", help="recorded requests")
    group.add_argument("--format", help="of the trace, where it cannot be told")
    group.add_argument("--isl", type=float, metavar="TOKENS", help="mean length of prompts, without a trace")
    group.add_argument("--osl", type=float, metavar="TOKENS", help="mean length of outputs, without a trace")
    group.add_argument("--cv", type=float, help="spread of both lengths: deviation over mean (default: 0)")
    group.add_argument("--arrival-cv", type=float, help="of the intervals (default: 1, a Poisson process)")
    group.add_argument("--rate", type=float, metavar="R", help="requests per second that the plan has to hold")
    group.add_argument("--images", type=int, default=0, metavar="N", help="pictures in every request, without a trace")
    group.add_argument("--image-size", metavar="WxH", help="in pixels (default: 1024x1024)")
    group = parser.add_argument_group("the targets")
    group.add_argument("--ttft", metavar="TIME", help="time to first token")
    group.add_argument("--tpot", metavar="TIME", help="time per output token after the first, mean of a request")
    group.add_argument("--attainment", type=float, default=0.9, metavar="A", help="share of requests within both (0.9)")
    group.add_argument(
        "--objective", choices=("goodput", "cost", "energy", "latency"), default="goodput",
        help="goodput: highest rate per accelerator; the others at --rate (default: %(default)s)",
    )  # fmt: skip
    group = parser.add_argument_group("where step times come from")
    group.add_argument(
        "--source", default="roofline", metavar="S", help="roofline, tables=FOLDER, aic or calibrated=FILE"
    )
    group.add_argument(
        "--host-time",
        metavar="TIME",
        help="of the host in each step, for aic and tables, which lack it: 4331us",
    )
    group = parser.add_argument_group("the search")
    group.add_argument(
        "--space", nargs="+", action="extend", default=[], metavar="NAME=VALUES",
        help="narrow or widen what is tried: tp=1,2 pp=1 dp=1,8 ep=yes,no kinds=colocated,pd,ea,epd seqs=64,256"
        " tokens=2048 quant=own,fp8,fp8+kv encode_tp=1 wide_tp=yes idle=yes schemes=apex",
    )  # fmt: skip
    group.add_argument("--placement", choices=("high", "low"), help="DistServe's algorithm for the disaggregated plan")
    group.add_argument("--method", choices=("bounds", "exhaustive", "optuna"), default="bounds",
                       help="which plans are simulated (default: %(default)s)")  # fmt: skip
    group.add_argument("--dler", action="store_true", help="the length-aware order of plugin dler in every engine")
    group.add_argument("--max-model-len", type=int, metavar="TOKENS", help="that every engine has to hold")
    group.add_argument("--requests", type=int, default=2000, help="of a simulation at least (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    group.add_argument("--processes", type=int, metavar="N", help="default: one per core")
    group.add_argument("--time-limit", metavar="TIME", help="then the best plan so far is taken")
    group.add_argument("--state", type=Path, metavar="FILE", help="keeps what was found; the same search goes on there")
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", type=Path, metavar="FLEET.yaml", help="the plan as a file for `vllm-suite up`")
    group.add_argument("--json", type=Path, metavar="FILE", help="everything in the report and more")
    group.add_argument("--html", type=Path, metavar="FILE", help="the report with pictures; needs extra `pictures`")
    group.add_argument("--timeline", type=Path, metavar="FILE", help="the best plan's run as Chrome trace")
    group = parser.add_argument_group("watching a fleet; the plan of the other arguments is taken to be running")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--watch", metavar="URL", help="of a Prometheus server that scrapes the fleet's engines")
    source.add_argument("--watch-file", type=Path, metavar="FILE", help="recorded windows in place of a server")
    group.add_argument(
        "--watch-selector", default="", metavar="LABELS",
        help='label matchers of the engines that answer, for example job="decode"',
    )  # fmt: skip
    group.add_argument(
        "--watch-window", metavar="TIME",
        help="that is looked at as one, several scrapes long (default: 60s)",
    )  # fmt: skip
    group.add_argument("--watch-metrics-port", type=int, metavar="PORT", help="serve Prometheus series there")
    group.add_argument(
        "--watch-metrics-host", default="127.0.0.1", metavar="HOST", help="address for them (default: %(default)s)"
    )
    group.add_argument("--watch-record", type=Path, metavar="FILE", help="keep the windows that were seen")
    group.add_argument("--watch-looks", type=int, metavar="N", help="end after so many looks")


def run(args: argparse.Namespace) -> int:
    """0 for a plan that meets the targets, 1 where there is none, 2 on bad input."""
    try:
        from vllm_suite.planner.report.command import plan
    except ModuleNotFoundError as error:
        if error.name != "numpy":
            raise
        print("vllm-suite plan: numpy is missing; pip install 'vllm-suite[planner]'", file=sys.stderr)
        return 2
    return plan(args)
