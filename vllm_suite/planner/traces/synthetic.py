"""Workloads that nobody recorded: lengths with a spread, a rate, and items."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_suite.fleet.traces import TraceError
from vllm_suite.planner.traces.rows import Row
from vllm_suite.planner.traces.workload import Workload
from vllm_suite.planner.workload import Item

_BATCH = 4096


def synthetic(
    isl: float,
    osl: float,
    *,
    cv: float = 0.0,
    output_cv: float | None = None,
    rate: float | None = None,
    arrival_cv: float = 1.0,
    items: tuple[Item, ...] = (),
    longest: int | None = None,
) -> Workload:
    """Endless requests with lengths of a given mean and spread.

    Args:
        isl, osl: mean tokens of text in a prompt, and of output; at least 1.
        cv, output_cv: coefficient of variation of prompts and of outputs (None: as prompts). 0 for one length, else a
            log-normal distribution.
        rate: requests per second, where one is wanted without naming it at each draw.
        arrival_cv: of the intervals; 1 for a Poisson process.
        items: of every request; their tokens come on top of `isl`.
        longest: tokens of prompt and output together; longer ones are cut, the output first.

    Raises:
        TraceError: a length below 1, or a negative spread.
    """
    output_cv = cv if output_cv is None else output_cv
    extra = sum(item.tokens for item in items)
    values = (isl, osl, cv, output_cv, arrival_cv)
    if not all(map(math.isfinite, values)) or min(isl, osl) < 1 or min(cv, output_cv, arrival_cv) < 0:
        raise TraceError(f"isl {isl}, osl {osl} have to be at least 1, cv {cv}, {output_cv}, {arrival_cv} at least 0")
    if longest is not None and longest < isl + extra + 1:
        raise TraceError(f"a prompt of {isl + extra:g} tokens and an output do not fit into {longest}")

    spread = f" ±{cv:.0%}" if cv else ""
    pictures = "".join(f" + {item.kind}" for item in items)
    name = f"{isl:g}{spread}{pictures} in, {osl:g}{f' ±{output_cv:.0%}' if output_cv else ''} out"
    content = repr((isl, osl, cv, output_cv, arrival_cv, longest, items))
    return Workload(
        name=name,
        rows=_Rows(isl, osl, cv, output_cv, extra, longest),
        count=None,
        rate=rate,
        span=0.0,
        mean_prompt=isl + extra,
        mean_output=osl,
        fingerprint=hashlib.sha256(content.encode()).hexdigest()[:16],
        cv=arrival_cv,
        items=items,
    )


@dataclass(frozen=True)
class _Rows:
    """A seed to endless rows."""

    isl: float
    osl: float
    cv: float
    output_cv: float
    extra: int
    longest: int | None

    def __call__(self, seed: int) -> Iterator[Row]:
        draw = np.random.default_rng([seed, 2])
        while True:
            prompts = _lengths(draw, self.isl, self.cv) + self.extra
            outputs = _lengths(draw, self.osl, self.output_cv)
            if self.longest is not None:
                prompts = np.minimum(prompts, self.longest - 1)
                outputs = np.minimum(outputs, self.longest - prompts)
            for prompt, output in zip(prompts.tolist(), outputs.tolist(), strict=True):
                yield Row(math.nan, prompt, output)


def _lengths(draw: np.random.Generator, mean: float, cv: float) -> np.ndarray[Any, Any]:
    if cv == 0:
        return np.full(_BATCH, round(mean))
    sigma = math.sqrt(math.log1p(cv * cv))
    found = draw.lognormal(math.log(mean) - sigma * sigma / 2, sigma, _BATCH)
    whole: np.ndarray[Any, Any] = np.maximum(1, np.rint(found)).astype(np.int64)
    return whole
