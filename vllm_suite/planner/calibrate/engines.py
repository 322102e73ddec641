"""Engines that are measured: each in a process of its own, obeying commands; what they answer, as cells."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from vllm_suite.planner.calibrate.design import Cell, features_of
from vllm_suite.planner.calibrate.fit import Measured
from vllm_suite.planner.sources.base import SourceError

DRIVER = "vllm_suite.compat.step_timing"
_POLL_S = 0.05
_START_S = 900.0


class EngineFailed(RuntimeError):
    """An engine ended or fell silent; the text ends with its log."""


class MeasuredEngine:
    """One engine process. `facts` are its limits, once it is ready."""

    def __init__(self, job: Mapping[str, Any], folder: Path, name: str, env: Mapping[str, str]) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        self._out, job_file = folder / f"{name}.jsonl", folder / f"{name}.json"
        self._out.unlink(missing_ok=True)
        job_file.write_text(json.dumps(dict(job)), encoding="utf-8")
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", DRIVER, str(job_file), str(self._out)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, env={**os.environ, **env}, start_new_session=True,
            )  # fmt: skip
        self._read: IO[str] | None = None
        self._partial = ""
        self.facts: dict[str, Any] = {}

    def wait_ready(self) -> None:
        """Until the engine is up. Raises EngineFailed."""
        self.facts = self._until("ready", _START_S)[0]["ready"]

    def start(self, cells: Sequence[Cell], order: Sequence[int], limit_s: float, phase: str) -> None:
        """Let it run cells in this order, until the time is up."""
        assert self._process.stdin is not None
        jobs = [cell.as_job() for cell in cells]
        command = {"cells": jobs, "order": list(order), "limit_s": limit_s, "phase": phase}
        self._process.stdin.write((json.dumps(command) + "\n").encode())
        self._process.stdin.flush()

    def rows(self, timeout_s: float) -> list[dict[str, Any]]:
        """What it measured since `start`. Raises EngineFailed."""
        return self._until("done", timeout_s)[:-1]

    def _until(self, key: str, timeout_s: float) -> list[dict[str, Any]]:
        deadline, found = time.monotonic() + timeout_s, []
        while True:
            for line in self._lines():
                found.append(json.loads(line))
                if key in found[-1]:
                    return found
            code = self._process.poll()
            if code is not None or time.monotonic() > deadline:
                why = f"said nothing for {timeout_s:.0f} s" if code is None else f"ended with status {code}"
                raise EngineFailed(f"{self.name} {why}\n{self.log.read_text(errors='replace')[-3000:]}")
            time.sleep(_POLL_S)

    def _lines(self) -> Iterator[str]:
        if self._read is None:
            if not self._out.exists():
                return
            self._read = self._out.open(encoding="utf-8")
        text = self._partial + self._read.read()
        *whole, self._partial = text.split("\n")
        yield from whole

    def stop(self) -> None:
        """End it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._read is not None:
            self._read.close()


@contextmanager
def engines(jobs: Sequence[Mapping[str, Any]], folder: Path, env: Mapping[str, str]) -> Iterator[list[MeasuredEngine]]:
    """Engines side by side, ready. Raises EngineFailed."""
    folder.mkdir(parents=True, exist_ok=True)
    started: list[MeasuredEngine] = []
    try:
        for number, job in enumerate(jobs):
            started.append(MeasuredEngine(job, folder, f"engine-{number}", env))
        for engine in started:
            engine.wait_ready()
        yield started
    finally:
        for engine in started:
            engine.stop()


def gathered(cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]]) -> tuple[list[Measured], int]:
    """Medians by cell, and how many steps held something else than asked for, which are left out.

    Raises:
        SourceError: no step held what it was to.
    """
    by_cell: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["as_asked"]:
            by_cell.setdefault(row["cell"], []).append(row)
    odd = len(rows) - sum(map(len, by_cell.values()))
    if not by_cell:
        raise SourceError(f"none of {len(rows)} measured steps held the batch that it was to")
    found = []
    for index, each in sorted(by_cell.items()):
        cell = cells[index]
        seconds = [row["seconds"] for row in each]
        columns = [row["contexts"] for row in each]
        contexts = [statistics.fmean(column) for column in zip(*columns, strict=True)] if cell.contexts else []
        middle = statistics.median(seconds)
        spread = statistics.median(abs(value - middle) for value in seconds) / middle
        found.append(Measured(cell.name, features_of(contexts, cell.chunks), middle, len(seconds), spread))
    return found, odd
