"""Output-length estimator: what a call costs, what a key holds, and how well it predicts recorded traces.

Times of calls are CPU times, the median over rounds of the mean of many calls. Predictions are prequential: each
request of a trace is asked about before it is observed, first at age 0 and then at each age it outlives, all with
`--cap`.
`skill` is 1 - squared error / variance (0: no better than the mean of all, known beforehand), `pinball` the mean
quantile loss at 0.5, 0.9 and 0.99 in tokens, each for:

    class      the estimator with the trace's class (client, predicted class), or the prompt's length where it has none
    global     the estimator without keys
    ewma       one exponentially weighted mean per class, weight 1/16, which knows no ages

`ratio` is the sum of all predictions at age 0 over that of the true lengths. With `--censor` observations are cut off
at 256, 1024 and 4096 tokens in turn, and `dropped` is the estimator that leaves out the ones that were; what is asked
about stays the whole length.

    python benchmarks/bench_lengths.py [--traces FILE ...] [--half odd] [--censor] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import arguments, positive, show_table, write_result

from vllm_suite.lengths import LengthModel, LengthSettings, OnlineLengths

AGES = (0, 100, 500, 2000)
QUANTILES = (0.5, 0.9, 0.99)
CENSORED_AT = (256, 1024, 4096)
KEYS = ["class:chat", "lora:a", "prompt:2048"]


# Cost of calls


def filled(keys: int, observations: int, seed: int = 1) -> OnlineLengths:
    """Log-normal lengths, capped at 8000, under so many classes."""
    rng = random.Random(seed)
    made = OnlineLengths(LengthSettings(max_keys=4 * keys))
    for index in range(observations):
        tokens = int(rng.lognormvariate(6.5, 1.0))
        made.observe([f"class:{index % keys}", KEYS[1], KEYS[2]], min(tokens, 8000), censored=tokens > 8000)
    return made


def timed(calls: int, rounds: int, work: Callable[[int], object]) -> float:
    """Microseconds per call of `work`, which gets the number of the call."""
    means = []
    for _ in range(rounds):
        began = time.thread_time()
        for index in range(calls):
            work(index)
        means.append((time.thread_time() - began) / calls * 1e6)
    return statistics.median(means)


def call_times(calls: int, rounds: int) -> dict[str, float]:
    """Microseconds per call, by what is called."""
    rng = random.Random(2)
    lengths = [min(int(rng.lognormvariate(6.5, 1.0)), 8000) for _ in range(4096)]
    made = filled(8, 20_000)
    grouped = filled(8, 20_000)
    for tokens in (300, 500, 900):
        grouped.observe(KEYS, tokens, group="g")
    keys = ["class:3", *KEYS[1:]]
    unknown = ["class:none", *KEYS[1:]]

    def observe(index: int) -> None:
        made.observe(keys, lengths[index & 4095], now=0.0)

    def both(index: int) -> None:
        made.observe(keys, lengths[index & 4095], now=0.0)
        made.remaining(keys, index & 1023, 8000)

    return {
        "observe, 3 keys": timed(calls, rounds, observe),
        "observe and remaining, 3 keys": timed(calls, rounds, both),
        "remaining, 3 keys": timed(calls, rounds, lambda index: made.remaining(keys, index & 1023, 8000)),
        "remaining, first key unknown": timed(calls, rounds, lambda index: made.remaining(unknown, index & 1023, 8000)),
        "remaining, no key": timed(calls, rounds, lambda index: made.remaining((), index & 1023, 8000)),
        "quantile, 3 keys": timed(calls // 8, rounds, lambda index: made.quantile(keys, 0.9, index & 1023, 8000)),
        "remaining, 3 siblings ended": timed(
            calls // 8, rounds, lambda index: grouped.remaining(keys, index & 1023, 8000, group="g", running=(400, 400))
        ),
    }


def state_costs(keys: int) -> dict[str, float]:
    """Memory per key, and what saving and loading takes."""
    tracemalloc.start()
    made = filled(keys, keys * 60)
    for index in range(keys):
        made.remaining([f"class:{index}"], 10, 8000)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lengths.json"
        began = time.perf_counter()
        assert made.save(path).outcome == "ok"
        saved = time.perf_counter()
        assert OnlineLengths(made.settings).load(path).outcome == "ok"
        loaded = time.perf_counter()
        size = path.stat().st_size
    return {
        "keys": keys,
        "memory per key, KiB": held / keys / 1024,
        "file, MiB": size / 2**20,
        "save, ms": (saved - began) * 1e3,
        "load, ms": (loaded - saved) * 1e3,
    }


# Prediction


class Ewma:
    """One number per class, as schedulers without distributions keep it."""

    def __init__(self, weight: float = 1 / 16) -> None:
        self._weight = weight
        self._means: dict[str, float] = {}

    def observe(self, keys: Sequence[str], tokens: int, *, censored: bool = False, now: float | None = None) -> None:
        for key in ("", *keys):
            mean = self._means.get(key)
            self._means[key] = tokens if mean is None else mean + self._weight * (tokens - mean)

    def remaining(self, keys: Sequence[str], age: int, cap: int) -> float | None:
        for key in (*keys, ""):
            if key in self._means:
                return min(max(self._means[key] - age, 1.0), cap - age)
        return None

    def quantile(self, keys: Sequence[str], q: float, age: int, cap: int) -> float | None:
        return self.remaining(keys, age, cap)


class Dropping(OnlineLengths):
    """The estimator without what was cut off."""

    def observe(self, keys: Sequence[str], tokens: int, *, censored: bool = False, **rest: Any) -> None:
        if not censored:
            super().observe(keys, tokens, **rest)


def read_trace(path: Path) -> list[tuple[list[str], int]]:
    """Keys and output length of each request."""
    from replay_traces import read_rows

    def keys(row: Any) -> list[str]:
        return [f"class:{row.label}"] if row.label else [f"prompt:{row.prompt.bit_length()}"]

    return [(keys(row), row.output) for row in read_rows(path)]


def predict(
    rows: Sequence[tuple[list[str], int]], model: LengthModel, *, keyed: bool, censor: bool, cap: int
) -> dict[str, float]:
    """Scores of one model over one trace, from knowing nothing."""
    counts = dict.fromkeys(AGES, 0)
    sums, squares, errors = (dict.fromkeys(AGES, 0.0) for _ in range(3))
    loss, asked, predicted = 0.0, 0, 0.0
    for index, (found, length) in enumerate(rows):
        keys = found if keyed else []
        for age in AGES:
            if length <= age:
                break
            rest = model.remaining(keys, age, cap)
            if rest is None:
                break
            truth = min(length, cap) - age
            counts[age] += 1
            predicted += 0.0 if age else rest
            sums[age] += truth
            squares[age] += truth * truth
            errors[age] += (truth - rest) ** 2
            if index % 4:
                continue
            for q in QUANTILES:
                guess = model.quantile(keys, q, age, cap) or 0.0
                loss += q * (truth - guess) if truth > guess else (1 - q) * (guess - truth)
                asked += 1
        cut = CENSORED_AT[index % 3] if censor else cap
        model.observe(keys, min(length, cut), censored=length > cut, now=float(index))
    scores = {"pinball": loss / max(asked, 1), "ratio": predicted / max(sums[0], 1.0)}
    for age in AGES:
        if counts[age] > 100:
            variance = squares[age] - sums[age] ** 2 / counts[age]
            scores[f"skill at {age}"] = 1.0 - errors[age] / variance
    return scores


def half_of(rows: list[Any], half: str) -> list[Any]:
    return rows if half == "all" else rows[1 if half == "odd" else 0 :: 2]


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--traces", metavar="FILE", type=Path, nargs="+", default=[], help="see benchmarks/README.md")
    parser.add_argument("--half", choices=["all", "even", "odd"], default="all", help="requests of a trace to use")
    parser.add_argument("--requests", type=positive, default=20_000, help="at most so many of each trace")
    parser.add_argument("--cap", type=positive, default=32_768, help="output tokens allowed to each request")
    parser.add_argument("--censor", action="store_true", help=f"cut observations off at {CENSORED_AT}")
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], help="a setting of the estimator")
    args = parser.parse_args(argv)
    load = os.getloadavg()
    calls, rounds = (500, 3) if args.quick else (20_000, 7)
    settings = chosen_settings(parser, args.set)
    times = call_times(calls, rounds)
    show_table("Time", ["call", "us"], [[name, f"{value:.2f}"] for name, value in times.items()])
    state = state_costs(100 if args.quick else 1000)
    show_table("State", ["", "value"], [[name, f"{value:.4g}"] for name, value in state.items()])
    predictions: dict[str, dict[str, dict[str, float]]] = {}
    for path in args.traces:
        rows = half_of(read_trace(path)[: args.requests], args.half)
        ways: dict[str, tuple[LengthModel, bool]] = {
            "class": (OnlineLengths(settings), True),
            "global": (OnlineLengths(settings), False),
            "ewma": (Ewma(), True),
        }
        if args.censor:
            ways["dropped"] = (Dropping(settings), True)
        predictions[path.name] = {
            way: predict(rows, model, keyed=keyed, censor=args.censor, cap=args.cap)
            for way, (model, keyed) in ways.items()
        }
    for name, scores in predictions.items():
        columns = list(scores["class"])
        table = [
            [way, *(f"{found.get(column, float('nan')):.3f}" for column in columns)] for way, found in scores.items()
        ]
        show_table(name, ["", *columns], table)
    result = {
        "arguments": {"half": args.half, "cap": args.cap, "censor": args.censor, "requests": args.requests},
        "settings": settings.model_dump(),
        "microseconds": times,
        "state": state,
        "predictions": predictions,
    }
    write_result(args.json, "bench_lengths", result, load)
    return 0


def chosen_settings(parser: argparse.ArgumentParser, given: Sequence[str]) -> LengthSettings:
    import yaml
    from pydantic import ValidationError

    fields = dict(item.partition("=")[::2] for item in given)
    try:
        return LengthSettings.model_validate({name: yaml.safe_load(value) for name, value in fields.items()})
    except ValidationError as exc:
        parser.error(str(exc))


if __name__ == "__main__":
    sys.exit(main())
