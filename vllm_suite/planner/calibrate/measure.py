"""A calibration from beginning to end: engines, grid, fit, cross-validation."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vllm_suite.planner.calibrate.design import Cell, Range, grid, order
from vllm_suite.planner.calibrate.engines import MeasuredEngine, engines, gathered
from vllm_suite.planner.calibrate.file import Bounds, Calibration, CellRow, Coefficients, Errors, Fitted
from vllm_suite.planner.calibrate.fit import Measured, cross_validated, fit, knots_of, relative_errors
from vllm_suite.planner.sources.base import SourceError
from vllm_suite.provenance import device_name, provenance

_CYCLES = 400
# Phases take turns, so that the machine's drift is in none of them alone.
_TURNS = 4
# What one step or the set-up of one batch may take beyond the limit.
_PATIENCE_S = 300.0


@dataclass(frozen=True)
class Options:
    """What is calibrated and for how long.

    Attributes:
        model: checkpoint folder or hub name.
        engine: vLLM's engine arguments by name, for example ``{"max_num_seqs": 16}``.
        engines: engines of a kind that share the machine; with more than one every cell is measured alone and again
            with all of them at work.
        threads: compute threads of each, on CPU.
        seconds: for the grid, of each phase.
        dense: see `Range`.
        folder: for logs; a temporary one by default.
    """

    model: str
    device: Literal["cpu", "gpu"]
    engine: dict[str, Any] = field(default_factory=dict)
    engines: int = 1
    threads: int = 1
    seconds: float = 180.0
    dense: float = 1.0
    seed: int = 0
    folds: int = 5
    folder: Path | None = None


def calibrate(options: Options, say: Callable[[str], None] = lambda text: None) -> Calibration:
    """Measure and fit.

    Raises:
        EngineFailed: an engine did not start, or ended; the text ends with its log.
        SourceError: too little was measured for a fit.
    """
    load = list(os.getloadavg())
    if options.folder is None:
        with tempfile.TemporaryDirectory(prefix="calibrate-") as folder:
            return _calibrate(options, Path(folder), load, say)
    return _calibrate(options, options.folder, load, say)


def _calibrate(options: Options, folder: Path, load: list[float], say: Callable[[str], None]) -> Calibration:
    jobs = [job(options, number) for number in range(options.engines)]
    say(f"starting {options.engines} engine{'s' * (options.engines > 1)} with {options.model}")
    with engines(jobs, folder, environment(options)) as running:
        facts = running[0].facts
        cells = grid(
            Range(
                max_num_seqs=facts["max_num_seqs"],
                max_num_batched_tokens=facts["max_num_batched_tokens"],
                max_model_len=facts["max_model_len"],
                kv_tokens=facts["blocks"] * facts["block_size"],
                block=facts["block_size"],
                dense=options.dense,
            )
        )
        _warm_up(running, cells, options)
        measured = _measured(running, cells, options, say)
    knots = knots_of([cell for cells_, _ in measured.values() for cell in cells_])
    odd = sum(count for _, count in measured.values())
    fits = {phase: fitted(found, knots, options) for phase, (found, _) in measured.items()}
    return Calibration(
        model=Path(options.model).name,
        path=options.model,
        device=options.device,
        machine=device_name(),
        engine=options.engine,
        facts=facts,
        alone=fits["alone"],
        beside=fits.get("beside"),
        engines=options.engines,
        grid=[
            CellRow(
                name=cell.name,
                phase=phase,
                steps=tuple(float(each) for each in cell.steps),
                seconds=cell.seconds,
                samples=cell.samples,
                spread=cell.spread,
            )
            for phase, (found, _) in measured.items()
            for cell in found
        ],
        odd_steps=odd,
        load_average=[*load, *os.getloadavg()],
        provenance=provenance(seed=options.seed),
    )


def fitted(cells: Sequence[Measured], knots: tuple[float, ...], options: Options) -> Fitted:
    """Fit, bounds and held-out error of one phase."""
    model = fit(cells, knots)
    decode = [cell.steps.decode_context / cell.steps.decode_sequences for cell in cells if cell.steps.decode_sequences]
    before = [cell.steps.prefill_context / cell.steps.prefill_chunks for cell in cells if cell.steps.prefill_chunks]
    if not decode or not before:
        raise SourceError("the grid was not measured far enough to see both prompts and decode; give it more time")
    bounds = Bounds(
        tokens=max(cell.steps.tokens for cell in cells),
        sequences=max(cell.steps.decode_sequences for cell in cells),
        chunks=max(cell.steps.prefill_chunks for cell in cells),
        before=max(before),
        context_low=min(decode),
        context_high=max(decode),
    )
    held_out = cross_validated(cells, options.folds, options.seed)
    residual = float(abs(relative_errors(model, cells)).mean())
    step = Coefficients.model_validate(model.as_json())
    return Fitted(step=step, bounds=bounds, held_out=Errors.of(held_out), residual_mean=residual)


def _warm_up(running: Sequence[MeasuredEngine], cells: Sequence[Cell], options: Options) -> None:
    """First use of kernels, and the prefix cache: a few cells of each kind, not counted."""
    few = order(len(cells), 1, options.seed + 1)[: max(4, len(cells) // 8)]
    for engine in running:
        engine.start(cells, few, options.seconds, "warm-up")
    for engine in running:
        engine.rows(options.seconds + _PATIENCE_S)


def _measured(
    running: Sequence[MeasuredEngine], cells: list[Cell], options: Options, say: Callable[[str], None]
) -> dict[str, tuple[list[Measured], int]]:
    """Every phase's cells, and how many steps were left out."""
    phases = {"alone": running[:1]} | ({"beside": running} if len(running) > 1 else {})
    turns = _TURNS if len(phases) > 1 else 1
    rows: dict[str, list[dict[str, Any]]] = {phase: [] for phase in phases}
    orders = {
        phase: [order(len(cells), _CYCLES, options.seed + 100 * number) for number in range(len(engines_))]
        for phase, engines_ in phases.items()
    }
    for turn in range(turns):
        for phase, at_work in phases.items():
            say(f"measuring {len(cells)} batches, {len(at_work)} engine(s) at work, turn {turn + 1} of {turns}")
            rows[phase] += _turn(at_work, cells, orders[phase], phase, options.seconds / turns)
    found = {}
    for phase, each in rows.items():
        cells_, odd = gathered(cells, each)
        missing = len(cells) - len(cells_)
        say(f"{phase}: {len(each)} steps of {len(cells_)} batches; {odd} left out, {missing} batches not reached")
        found[phase] = cells_, odd
    return found


def _turn(
    running: Sequence[MeasuredEngine], cells: list[Cell], orders: list[list[int]], phase: str, seconds: float
) -> list[dict[str, Any]]:
    """The steps of a stretch of time. What was visited is taken off the orders."""
    for engine, places in zip(running, orders, strict=True):
        engine.start(cells, places, seconds, phase)
    rows = [engine.rows(seconds + _PATIENCE_S) for engine in running]
    for each, places in zip(rows, orders, strict=True):
        del places[: round(sum(1 / cells[row["cell"]].steps for row in each))]
    # The last rows of an engine were measured after another one had stopped.
    ends = min((each[-1]["at"] for each in rows if each), default=0.0)
    return [row for each in rows for row in each if row["at"] <= ends]


def environment(options: Options) -> dict[str, str]:
    """Of an engine's process."""
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if options.device == "cpu":
        env |= {
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": str(options.threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
    if Path(options.model).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    return env


def job(options: Options, number: int) -> dict[str, Any]:
    """What the process of an engine is told: arguments, cores, and which token ids to draw prompts from."""
    engine: dict[str, Any] = {"model": options.model, **options.engine}
    cores: list[int] = []
    if options.device == "cpu":
        engine = {"enforce_eager": True, **engine}
        every = sorted(os.sched_getaffinity(0))
        if options.engines * options.threads <= len(every):
            cores = every[number * options.threads : (number + 1) * options.threads]
    return {
        "engine": engine,
        "device": options.device,
        "threads": options.threads,
        "cores": cores,
        "seed": options.seed + number,
        "token_ids": list(token_ids(options.model)),
    }


def token_ids(model: str) -> tuple[int, int]:
    """Ids that are plain text in common vocabularies, which keep special tokens below 300 or at the end."""
    size = 5000
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        size = int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or size)
    except (OSError, ValueError):
        pass
    return min(300, size // 4), min(5000, size - size // 8)


def show(found: Calibration) -> str:
    """The outcome in a few lines."""
    lines = []
    for name, part in (("alone", found.alone), ("beside others", found.beside)):
        if part is not None:
            error = part.held_out
            lines.append(
                f"{name}: held-out error {error.mean:.1%} in the mean, nine in ten within {error.p90:.1%}, worst"
                f" {error.worst:+.1%} ({error.worst_cell}); {error.cells} batches, {error.folds} folds"
            )
    for kind, each in found.serving.items():
        lines.append(
            f"served, {kind}: {each.step_s * 1e3:.2f} ms a step, {each.sequence_s * 1e3:.2f} ms a token,"
            f" {each.request_s * 1e3:.1f} ms a request, {each.prompt_token_s * 1e6:.1f} us a prompt token"
            + ("" if each.router_s is None else f"; {each.router_s * 1e3:.1f} ms of that in the router")
            + f"; {each.prompt_cpu_s * 1e3:.1f} ms of the cores a prompt, {each.busy_s * 1e3:.1f} ms more in company"
        )
    return "\n".join(lines)
