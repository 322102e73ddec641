"""What DLER takes off a wordy model's answers, and what each part of the recipe adds, on two CPU cores.

A two-layer model learns from wordy solutions to add digits modulo 10, then `vllm-suite dler train` shortens it.
Accuracy and mean length are of held-out questions at temperature 1, with room for five times the truncation length.
Beside the recipe: advantages scaled per group (GRPO), a symmetric clip, no dynamic sampling. The first model and the
number of steps are the same for all.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import arguments, positive, scratch, show_table, write_result
from svg_plot import Panel, write_svg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

SHORTER, MINUTES = 0.5, 10.0
TIMEOUT_S = 1800.0
VARIANTS: dict[str, dict[str, Any]] = {
    "DLER": {},
    "per-group normalisation": {"advantage": "group"},
    "symmetric clip": {"clip_high": 0.2},
    "no dynamic sampling": {"dynamic_sampling": False, "prompts_per_round": None},
}


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--sft-steps", type=positive, default=250, help="supervised steps of the wordy model (250)")
    parser.add_argument("--steps", type=positive, help="steps of DLER (default: those of the test)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of each variant for each (0)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw length and accuracy over steps, as SVG")
    args = parser.parse_args()
    if args.quick:
        args.sft_steps, args.steps, args.variants = 20, 2, args.variants[:1]
    load = os.getloadavg()
    with scratch("dler-train-") as folder:
        result = measure(folder, args)
    table(result)
    write_result(args.json, "dler_train", result, load)
    if args.plot:
        plot(args.plot, result)
        print(f"wrote {args.plot}")
    met = all(run["met"] for run in result["runs"] if run["variant"] == "DLER")
    print(f"target, at least {SHORTER:.0%} shorter and no less accurate: {'met' if met else 'missed'}")
    return 0 if met or args.quick else 1


def measure(folder: Path, args: Any) -> dict[str, Any]:
    """The wordy model, then each variant from it."""
    import torch
    import wordy_sums

    torch.set_num_threads(1)  # matrices this small gain nothing from more
    began, cpu = time.monotonic(), _cpu()
    rows = wordy_sums.prepare(folder, steps=args.sft_steps)
    sft = {"wall_seconds": time.monotonic() - began, "cpu_seconds": _cpu() - cpu, **rows}
    print(f"wordy model: {sft['cpu_seconds']:.0f} s of CPU time, loss {sft['loss']:.3f}", flush=True)
    runs = []
    for seed in args.seeds:
        for variant in args.variants:
            runs.append(one(folder, variant, seed, args.steps))
            last = runs[-1]
            print(
                f"{variant}, seed {seed}: {last['length_change']:+.0%} tokens, {last['accuracy_change']:+.1%}",
                flush=True,
            )
    return {"sft": sft, "shape": wordy_sums.SHAPE, "runs": runs}


def one(folder: Path, variant: str, seed: int, steps: int | None) -> dict[str, Any]:
    """One run of the command; its report and its log."""
    import wordy_sums
    import yaml

    name = f"{variant.replace(' ', '-')}-{seed}"
    settings = wordy_sums.dler_settings(folder) | VARIANTS[variant] | {"seed": seed}
    if steps:
        settings["steps"] = steps
    file, report, output = folder / f"{name}.yaml", folder / f"{name}.json", folder / name
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "vllm_suite.cli.main", "dler", "train", str(file), "-o", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    began, cpu = time.monotonic(), _cpu()
    subprocess.run([*command, "--json", str(report)], env=environment, check=True, timeout=TIMEOUT_S)
    told: dict[str, Any] = json.loads(report.read_text())
    log = [json.loads(line) for line in (output / "training" / "log.jsonl").read_text().splitlines()]
    before, after = told["before"], told["after"]
    length = after["length"] / before["length"] - 1
    accuracy = after["accuracy"] - before["accuracy"]
    taken = [entry for entry in log if not entry.get("measured")]
    return {
        "variant": variant,
        "seed": seed,
        "command_wall_seconds": time.monotonic() - began,
        "command_cpu_seconds": _cpu() - cpu,
        "before": before,
        "after": after,
        "length_change": length,
        "accuracy_change": accuracy,
        "met": length <= -SHORTER and accuracy >= 0,
        "measured": told["measured"],
        "answers_sampled": sum(entry["groups_sampled"] for entry in taken) * settings["group_size"],
        "steps": taken,
        "settings": told["settings"],
    }


def table(result: dict[str, Any]) -> None:
    """One line per run."""
    rows = []
    for run in result["runs"]:
        steps = run["steps"]
        rows.append(
            [
                f"{run['variant']}, seed {run['seed']}",
                f"{run['before']['length']:.1f} -> {run['after']['length']:.1f}",
                f"{run['length_change']:+.0%}",
                f"{run['before']['accuracy']:.1%} -> {run['after']['accuracy']:.1%}",
                f"{sum(step['entropy'] for step in steps[-5:]) / len(steps[-5:]):.3f}",
                f"{sum(step['clipped'] for step in steps) / len(steps):.2%}",
                f"{run['answers_sampled']:.0f}",
                f"{run['command_cpu_seconds']:.0f} s",
            ]
        )
    columns = ["", "tokens", "change", "accuracy", "entropy", "clipped", "answers sampled", "CPU time"]
    answers = result["runs"][0]["after"]["answers"]
    show_table(f"DLER on wordy sums, {answers:.0f} held-out answers", columns, rows)
    recipe = [run for run in result["runs"] if run["variant"] == "DLER"]
    if recipe:
        cpu = (result["sft"]["cpu_seconds"] + recipe[0]["command_cpu_seconds"]) / 60
        wall = (result["sft"]["wall_seconds"] + recipe[0]["command_wall_seconds"]) / 60
        print(
            f"\nsupervised steps and DLER together: {wall:.1f} min, {cpu:.1f} min of CPU time; target {MINUTES:.0f} min"
        )


def plot(file: Path, result: dict[str, Any]) -> None:
    """Length and accuracy over steps, the mean over seeds."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in result["runs"]:
        runs.setdefault(run["variant"], []).append(run)
    steps = [entry["step"] for entry in result["runs"][0]["measured"]]

    def line(of: list[dict[str, Any]], key: str, scale: float) -> list[float]:
        return [scale * sum(run["measured"][i][key] for run in of) / len(of) for i in range(len(steps))]

    panels = [
        Panel(title, "step", steps, {name: line(of, key, scale) for name, of in runs.items()})
        for title, key, scale in (("mean length, tokens", "length", 1.0), ("accuracy, %", "accuracy", 100.0))
    ]
    seeds = sorted({run["seed"] for run in result["runs"]})
    write_svg(file, panels, f"bench_dler_train.py; mean over seeds {', '.join(map(str, seeds))}")


def _cpu() -> float:
    """Seconds of CPU time of this process and its finished children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    raise SystemExit(main())
