"""Quality of a checkpoint: which engine runs an evaluation takes, and their results put together.

A SwiftKV model takes two runs, one after the other: tasks by log-likelihood with every layer computing every token,
tasks that generate with the skip on, as it serves. An ordinary model takes one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_swiftkv.evaluate_tasks import Request, Tasks
from vllm_swiftkv.evaluate_worker import RunSpec
from vllm_swiftkv.families import SwiftKVError

_TAIL_LINES = 15
_STOP_S = 20.0


class RunFailed(RuntimeError):
    """An engine run ended without results; the text says why."""


def is_swiftkv(model: str) -> bool:
    """Whether a checkpoint's ``config.json`` is a SwiftKV model's. Raises SwiftKVError where there is none."""
    from transformers import PreTrainedConfig

    from vllm_swiftkv.options import is_swiftkv as by_config

    folder = Path(model)
    if folder.exists() and not (folder / "config.json").is_file():
        raise SwiftKVError(f"{model}: no checkpoint there (config.json is missing)")
    try:
        config, _ = PreTrainedConfig.get_config_dict(model)
    except (OSError, ValueError) as error:
        raise SwiftKVError(
            f"{model} is no folder with a checkpoint, and cannot be had from the Hugging Face hub: "
            f"{next(iter(str(error).splitlines()), type(error).__name__)}"
        ) from error
    return by_config(config)


def prepare(requests: Sequence[Request], include_path: str | None) -> dict[str, bool]:
    """Check names and datasets before any engine starts; says of each request whether it only generates."""
    names = [request.name for request in requests]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # each run says the same again
    tasks = Tasks(include_path, names)
    tasks.check(names)
    for name in names:
        tasks.load_one_of_each_dataset(name)
    return {name: tasks.generates(name) for name in names}


def plan(model: str, swiftkv: bool, generates: dict[str, bool], common: RunSpec) -> Iterator[RunSpec]:
    """The engine runs of one model."""
    if not swiftkv:
        yield common.model_copy(update={"model": model, "skip": None})
        return
    for skip in (False, True):
        chosen = tuple(request for request in common.requests if generates[request.name] is skip)
        if chosen:
            yield common.model_copy(update={"model": model, "skip": skip, "requests": chosen})


def execute(
    specs: Sequence[RunSpec],
    timeout_s: float,
    done: Callable[[RunSpec, dict[str, Any]], None],
    say: Callable[[str], None],
) -> None:
    """Run engines one after the other; ``done`` gets each result as it comes, so that a later failure loses nothing.

    Raises SwiftKVError for what a run refuses, RunFailed for one that breaks or takes longer than ``timeout_s``.
    """
    for number, spec in enumerate(specs, 1):
        how = {None: "ordinary model", False: "skip off", True: "skip on"}[spec.skip]
        names = ", ".join(request.name for request in spec.requests)
        say(f"engine run {number} of {len(specs)}: {spec.model}, {how}: {names}")
        done(spec, _run(spec, timeout_s))


def _run(spec: RunSpec, timeout_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="swiftkv-eval-") as folder:
        given, out, log = (Path(folder) / name for name in ("spec.json", "out.json", "log"))
        given.write_text(spec.model_dump_json(), encoding="utf-8")
        shown = sys.stderr.isatty()
        with log.open("wb") as file:
            # Its standard output goes where progress goes, so that ours holds the table alone.
            status = _wait(
                [sys.executable, "-m", "vllm_swiftkv.evaluate_worker", str(given), str(out)],
                None if shown else file,
                timeout_s,
            )
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        if status == 0:
            return found
        if status == 2:
            raise SwiftKVError(found["error"])
        lines = [] if shown else log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
        reason = found.get("error") or f"its process ended with status {status}"
        raise RunFailed("\n".join([*lines, f"{spec.model}: {reason}"]))


def _wait(command: list[str], log: Any, timeout_s: float) -> int:
    """Status of the process. Whatever happens, it and all its children, engine cores among them, are ended here."""
    env = {"VLLM_LOGGING_LEVEL": "WARNING", **os.environ}
    process = subprocess.Popen(command, stdout=log or sys.stderr.fileno(), stderr=log, env=env, process_group=0)
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired as error:
        raise RunFailed(f"an engine run took longer than {timeout_s:.0f} s (--timeout)") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_S)
        with contextlib.suppress(ProcessLookupError):  # the group outlives a process that was killed
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write_samples(folder: Path, label: str, result: dict[str, Any]) -> None:
    """Every document with the model's answer: one JSON-lines file per task."""
    folder.mkdir(parents=True, exist_ok=True)
    for request in result["requests"].values():
        for task, rows in (request["results"].get("samples") or {}).items():
            with (folder / f"{label}_{task}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
