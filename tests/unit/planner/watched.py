"""Windows of traffic and plans for the tests of the watch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vllm_suite.planner.models import Parallel
from vllm_suite.planner.plan import Plan, PoolPlan
from vllm_suite.planner.watch import (
    Histogram,
    Window,
)

BOUNDS = (1.0, 10.0, 100.0, 1000.0, math.inf)
SMALL = Plan((PoolPlan("any", 2, Parallel(tp=2)),))
LARGE = Plan((PoolPlan("any", 4, Parallel(tp=2)),))
APART = Plan((PoolPlan("prefill", 1, Parallel(tp=2)), PoolPlan("decode", 1, Parallel(tp=2), max_num_seqs=128)))


def counted(lengths: np.ndarray[Any, Any]) -> Histogram:
    place = np.searchsorted(BOUNDS, lengths, side="left")
    return Histogram(BOUNDS, tuple(map(float, np.bincount(place, minlength=len(BOUNDS)))), float(lengths.sum()))


def stretch(
    draw: np.random.Generator, start: float, rate: float = 5.0, longer: float = 1.0, uneven: float = 0.0
) -> Window:
    """A minute of traffic; `uneven` is the variance of its rate over the mean."""
    now = rate * draw.gamma(1 / uneven, uneven) if uneven else rate
    count = int(draw.poisson(60 * now))
    prompts = np.rint(longer * draw.lognormal(5, 1, count)) + 1
    return Window(start, 60.0, count, counted(prompts), counted(np.rint(draw.lognormal(4, 1, count)) + 1))
