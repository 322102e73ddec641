"""From measured steps to a step model: non-negative least squares on relative errors, and what cells left out show."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_suite.planner.calibrate.model import SMALL, TERMS, StepModel, design_matrix
from vllm_suite.planner.sources.base import FloatArray, SourceError
from vllm_suite.planner.sources.steps import Steps

# Knots nearer to each other than this factor are told apart by noise only.
_APART = 1.3
_TWO_THIRDS = 2 / 3


@dataclass(frozen=True)
class Measured:
    """One cell of the grid: what its steps held in the mean, and the median of their times in seconds."""

    name: str
    steps: Steps
    seconds: float
    samples: int = 1
    spread: float = 0.0


@dataclass(frozen=True)
class HeldOut:
    """Errors on cells that the fit did not see, as shares of the measured time.

    Attributes:
        mean, p90: of the absolute errors.
        two_thirds: two cells in three are off by less.
        bias: mean of the signed errors.
        worst, worst_cell: the largest.
        folds, cells: how many parts the cells were divided into, and how many there are.
    """

    mean: float
    p90: float
    two_thirds: float
    bias: float
    worst: float
    worst_cell: str
    folds: int
    cells: int


def nonnegative(matrix: FloatArray, target: FloatArray) -> FloatArray:
    """The x >= 0 with the least |matrix x - target|: Lawson and Hanson's active set (1974, chapter 23).

    Raises:
        SourceError: no end after many steps.
    """
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    scaled = matrix / scale
    count = scaled.shape[1]
    found, free = np.zeros(count), np.zeros(count, dtype=bool)
    gradient = scaled.T @ target
    tolerance = 1e-10 * max(1.0, float(np.abs(gradient).max()))
    for _ in range(30 * count):
        if free.all() or gradient[~free].max() <= tolerance:
            return np.asarray(found / scale)
        free[np.argmax(np.where(free, -np.inf, gradient))] = True
        while True:
            trial = np.zeros(count)
            trial[free] = np.linalg.lstsq(scaled[:, free], target, rcond=None)[0]
            bad = free & (trial <= 0)
            if not bad.any():
                break
            # As far towards the trial as all stay non-negative; the one that reaches 0 is fixed there.
            share = float((found[bad] / (found[bad] - trial[bad])).min())
            found = found + share * (trial - found)
            free &= found > tolerance
            found[~free] = 0.0
        found = trial
        gradient = scaled.T @ (target - scaled @ found)
    raise SourceError("the fit does not converge")


def stacked(cells: Sequence[Measured]) -> Steps:
    """The cells' sums as arrays."""
    return Steps(*(np.array(column, dtype=float) for column in zip(*(cell.steps for cell in cells), strict=True)))


def knots_of(cells: Sequence[Measured]) -> tuple[float, ...]:
    """Token counts that were measured, from 1 on, those left out that lie close to another; the largest is kept."""
    sizes = sorted({float(cell.steps.tokens) for cell in cells})
    kept = [1.0]
    for size in sizes:
        if size >= _APART * kept[-1]:
            kept.append(size)
    if kept[-1] < sizes[-1]:
        if len(kept) > 1:
            kept.pop()
        kept.append(sizes[-1])
    return tuple(kept)


def fit(cells: Sequence[Measured], knots: tuple[float, ...] | None = None) -> StepModel:
    """The model with the least sum of squared relative errors.

    Raises:
        SourceError: fewer cells than numbers to find, or a time that is not positive.
    """
    knots = knots_of(cells) if knots is None else knots
    needed = len(TERMS) + 2
    if len(cells) < needed:
        raise SourceError(f"{len(cells)} measured cells; a fit needs at least {needed}")
    seconds = np.array([cell.seconds for cell in cells])
    if not (seconds > 0).all():
        raise SourceError("a measured step took no time")
    matrix = design_matrix(stacked(cells), knots) / seconds[:, None]
    # A slope of either sign is the difference of two numbers that are not negative.
    either = [len(TERMS) + at for at, high in enumerate(knots[1:]) if high <= SMALL]
    found = nonnegative(np.concatenate([matrix, -matrix[:, either]], axis=1), np.ones(len(cells)))
    vector = found[: matrix.shape[1]]
    vector[either] -= found[matrix.shape[1] :]
    return StepModel.of_vector(vector, knots)


def relative_errors(model: StepModel, cells: Sequence[Measured]) -> FloatArray:
    """Predicted over measured, less 1."""
    seconds = np.array([cell.seconds for cell in cells])
    return np.asarray(model.seconds(stacked(cells)) / seconds - 1.0)


def cross_validated(cells: Sequence[Measured], folds: int = 5, seed: int = 0) -> HeldOut:
    """Each cell predicted by a fit on the other parts. A whole cell is left out, with all its repetitions.

    A cell at the rim of the grid is then predicted from inside it, so this is also what extrapolation by one grid point
    would cost.
    """
    knots = knots_of(cells)
    places = list(range(len(cells)))
    random.Random(seed).shuffle(places)
    errors = np.zeros(len(cells))
    for part in range(folds):
        left_out = places[part::folds]
        rest = [cells[place] for place in places if place not in set(left_out)]
        model = fit(rest, knots)
        errors[left_out] = relative_errors(model, [cells[place] for place in left_out])
    return summary(errors, cells, folds)


def summary(errors: FloatArray, cells: Sequence[Measured], folds: int) -> HeldOut:
    """Of signed relative errors, one for each cell."""
    size = np.abs(errors)
    worst = int(size.argmax())
    return HeldOut(
        mean=float(size.mean()),
        p90=float(np.quantile(size, 0.9)),
        two_thirds=float(np.quantile(size, _TWO_THIRDS)),
        bias=float(errors.mean()),
        worst=float(errors[worst]),
        worst_cell=cells[worst].name,
        folds=folds,
        cells=len(cells),
    )
