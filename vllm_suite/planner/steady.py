"""Whether a run settled, from when on, and how sure a share is that was counted in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]

Trend = Literal["steady", "growing", "short"]
"""`growing`: waits or gaps go on rising, the fleet does not keep up. `short`: fewer than four mean latencies long, so
that filling and emptying are most of it."""

_GROUPS = 8
_RISE = 0.15
_SLACK = 0.25
# One-sided 1 % of Student's t with as many degrees of freedom as a line through the groups leaves.
_SIGNIFICANT = 3.14


@dataclass(frozen=True)
class Window:
    """The part of a run that speaks for a longer one.

    Attributes:
        begin, end: stretches, the end excluded.
        trend: see `Trend`.
    """

    begin: int
    end: int
    trend: Trend


def window(
    counts: Floats, ttft: Floats, tpot: Floats, latency: float, width: float, last: float, stationary: bool
) -> Window:
    """Which stretches of the arrival clock to count.

    The fleet starts empty, so the first requests are served too well: the beginning is cut by the MSER rule (White
    1997: the cut after which the mean's squared standard error is least, to 25 %) on mean TTFT and TPOT, at most half
    of the run and at least one mean latency. It ends empty too: requests of the last mean latency decode beside fewer
    and fewer others. Where the traffic itself changes, only one mean latency is cut at each end.

    Args:
        counts, ttft, tpot: of each stretch the requests that arrived in it, and their means; nan for none.
        latency: mean of all requests, in seconds.
        width: seconds of a stretch.
        last: seconds to the last arrival.
        stationary: arrivals and lengths are alike from beginning to end.
    """
    size = len(counts)
    if stationary and size >= 2 * _GROUPS and any(growing(counts, series) for series in (ttft, tpot)):
        return Window(min(size // 4, math.ceil(latency / width)), size, "growing")
    if last < 4 * latency or size < 4:
        return Window(0, size, "short")
    edge = math.ceil(latency / width)
    begin = max(edge, *(mser(counts, series) for series in (ttft, tpot))) if stationary else edge
    return Window(begin, max(begin + 1, math.floor((last - latency) / width)), "steady")


def growing(counts: Floats, series: Floats) -> bool:
    """Whether a series of means still rises in the second half of the run.

    Three things have to hold: a line through eighths of the second half rises with a significance of 1 %, it rises by
    15 % of their mean, and the second half lies 15 % above the second quarter.
    """
    half = len(series) // 2
    pieces = [slice(part[0], part[-1] + 1) for part in np.array_split(np.arange(half, len(series)), _GROUPS)]
    means = np.array([_mean(counts[part], series[part]) for part in pieces])
    before = _mean(counts[half // 2 : half], series[half // 2 : half])
    if not np.isfinite(means).all() or not math.isfinite(before):
        return False
    steps = np.arange(_GROUPS) - (_GROUPS - 1) / 2
    slope = float((steps * means).sum() / (steps**2).sum())
    rest = means - means.mean() - slope * steps
    error = math.sqrt(float((rest**2).sum()) / (_GROUPS - 2) / float((steps**2).sum()))
    rise = slope * (_GROUPS - 1) / means.mean() if means.mean() > 0 else 0.0
    return slope > _SIGNIFICANT * error and rise > _RISE and means.mean() > (1 + _RISE) * before


def mser(counts: Floats, series: Floats) -> int:
    """How many of the first stretches to leave out: at most half."""
    values = np.where(counts > 0, series, np.nan)
    errors = []
    for cut in range(len(values) // 2 + 1):
        rest = values[cut:][~np.isnan(values[cut:])]
        errors.append(float(rest.var()) / len(rest) if len(rest) > 1 else math.inf)
    # The least of noisy values lies anywhere; the first that is about as small leaves most of the run.
    enough = (1 + _SLACK) * min(errors)
    return next((cut for cut, error in enumerate(errors) if error <= enough), 0)


def _mean(counts: Floats, series: Floats) -> float:
    some = (counts > 0) & ~np.isnan(series)
    return float(np.average(series[some], weights=counts[some])) if some.any() else math.nan


def share_interval(hits: Floats, counts: Floats, stretches: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a share, from batches of stretches, as neighbours in a queue are late together.

    It is never narrower than Wilson's interval for independent requests.

    Args:
        hits, counts: of each stretch.
        stretches: that a batch has at least, so that batches are about independent; there are 5 to 20 of them.
    """
    total = float(counts.sum())
    if not total:
        return 0.0, 1.0
    share = float(hits.sum()) / total
    low, high = _wilson(share, total, level)
    size = len(counts)
    batches = max(min(size, 5), min(20, size // max(1, stretches)))
    if batches > 1:
        parts = np.array_split(np.arange(size), batches)
        rest = np.array([hits[part].sum() - share * counts[part].sum() for part in parts])
        error = math.sqrt(batches / (batches - 1) * float((rest**2).sum())) / total
        half = _student(1 - (1 - level) / 2, batches - 1) * error
        low, high = min(low, share - half), max(high, share + half)
    return max(0.0, low), min(1.0, high)


def _wilson(share: float, total: float, level: float) -> tuple[float, float]:
    z = NormalDist().inv_cdf(1 - (1 - level) / 2)
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return middle - half, middle + half


def _student(q: float, freedom: int) -> float:
    """Quantile of Student's t by Cornish and Fisher's expansion: within 1 % from four degrees of freedom on."""
    z = NormalDist().inv_cdf(q)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
