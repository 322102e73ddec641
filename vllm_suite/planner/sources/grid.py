"""Measurements on a grid, with linear interpolation between the points along every axis."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vllm_suite.planner.sources.base import FloatArray, SourceError


class Line(NamedTuple):
    """A place on a grid: its value, how it changes along the last axis, and the next grid point there."""

    value: float
    slope: float
    ahead: float


class Grid:
    """Values over a rectangular grid of one to four axes.

    A point between grid points is interpolated linearly along each axis, so it lies between its neighbours; a point
    beyond an end takes the value at the end. Whoever asks looks at `low` and `high` first.
    """

    def __init__(self, axes: Sequence[Sequence[float] | FloatArray], values: FloatArray) -> None:
        self.axes = tuple(np.asarray(axis, dtype=float) for axis in axes)
        self.values = np.ascontiguousarray(values, dtype=float)
        if self.values.shape != tuple(len(axis) for axis in self.axes) or np.isnan(self.values).any():
            raise SourceError("a grid needs one number for each of its points")
        self._lists = tuple(axis.tolist() for axis in self.axes)
        # Smaller than a list of floats, and nearly as fast to index.
        self._flat = array("d", self.values.tobytes())
        self._strides = tuple(int(stride // self.values.itemsize) for stride in self.values.strides)

    @classmethod
    def of_rows(cls, rows: FloatArray) -> Grid:
        """From rows of coordinates with the value last, which need not be all points of one grid.

        Points that were not measured are filled in along one axis after the other, between measured ones only.

        Raises:
            SourceError: points at the rim are missing, so that the rest does not determine them.
        """
        axes, places = zip(*(np.unique(column, return_inverse=True) for column in rows[:, :-1].T), strict=True)
        values = np.full([len(axis) for axis in axes], np.nan)
        values[places] = rows[:, -1]
        for axis in reversed(range(values.ndim)):
            _fill(values, axis, axes[axis])
        if np.isnan(values).any():
            raise SourceError(f"{int(np.isnan(values).sum())} of {values.size} grid points cannot be filled in")
        return cls(axes, values)

    def low(self, axis: int) -> float:
        """The first point of an axis."""
        return float(self._lists[axis][0])

    def high(self, axis: int) -> float:
        """The last point of an axis."""
        return float(self._lists[axis][-1])

    def whole(self, axis: int) -> Grid:
        """The same grid with every whole number along an axis as a point, which makes queries at them cheaper."""
        points = np.unique(np.concatenate([self.axes[axis], np.arange(1, int(self.high(axis)) + 1)]))
        moved = np.moveaxis(self.values, axis, 0)
        at = np.clip(np.searchsorted(self.axes[axis], points, side="right") - 1, 0, max(0, len(self.axes[axis]) - 2))
        ahead = np.minimum(at + 1, len(self.axes[axis]) - 1)
        span = np.where(ahead > at, self.axes[axis][ahead] - self.axes[axis][at], 1.0)
        share = np.clip((points - self.axes[axis][at]) / span, 0.0, 1.0).reshape(-1, *[1] * (moved.ndim - 1))
        values = moved[at] * (1 - share) + moved[ahead] * share
        axes = [*self.axes[:axis], points, *self.axes[axis + 1 :]]
        return Grid(axes, np.moveaxis(values, 0, axis))

    def at(self, *point: float) -> float:
        """The value at one point."""
        return self.line(*point).value

    def line(self, *point: float) -> Line:
        """The value at one point, and how it goes on along the last axis up to the next point of the grid."""
        return self.lines(point[:-1], point[-1])[0]

    def lines(self, point: Sequence[float], *last: float) -> list[Line]:
        """The same for several places on the last axis that share the others."""
        corners = [(0, 1.0)]
        for points, stride, value in zip(self._lists, self._strides, point, strict=False):
            at = bisect_right(points, value) - 1
            if at < 0:
                continue
            here, low = at * stride, points[at]
            if value == low or at == len(points) - 1:
                corners = [(index + here, weight) for index, weight in corners]
                continue
            share = (value - low) / (points[at + 1] - low)
            rest, there = 1 - share, here + stride
            corners = [
                pair
                for index, weight in corners
                for pair in ((index + here, weight * rest), (index + there, weight * share))
            ]
        flat, points, found = self._flat, self._lists[-1], []
        for value in last:
            at = bisect_right(points, value) - 1
            if at < 0 or at == len(points) - 1:
                at = max(at, 0)
                total = 0.0
                for index, weight in corners:
                    total += weight * flat[index + at]
                found.append(Line(total, 0.0, points[0] if value < points[0] else math.inf))
                continue
            near = far = 0.0
            for index, weight in corners:
                near += weight * flat[index + at]
                far += weight * flat[index + at + 1]
            slope = (far - near) / (points[at + 1] - points[at])
            found.append(Line(near + slope * (value - points[at]), slope, points[at + 1]))
        return found

    def many(self, *points: FloatArray) -> FloatArray:
        """The values at many points, given as one array for each axis."""
        shape, flat = np.shape(points[0]), self.values.ravel()
        corners = [(np.zeros(shape, dtype=np.intp), np.ones(shape))]
        for axis, stride, values in zip(self.axes, self._strides, points, strict=True):
            last = len(axis) - 1
            at = np.clip(np.searchsorted(axis, values, side="right") - 1, 0, last)
            ahead = np.minimum(at + 1, last)
            share = np.clip((values - axis[at]) / np.where(ahead > at, axis[ahead] - axis[at], 1.0), 0.0, 1.0)
            here = [(index + at * stride, weight * (1 - share)) for index, weight in corners]
            if share.any():
                here += [(index + ahead * stride, weight * share) for index, weight in corners]
            corners = here
        total = np.zeros(shape)
        for index, weight in corners:
            total += flat[index] * weight
        return total


def _fill(values: FloatArray, axis: int, points: FloatArray) -> None:
    """Fill what is missing between known values of each line along an axis, in place."""
    lines = np.moveaxis(values, axis, -1)
    for at in np.ndindex(lines.shape[:-1]):
        line = lines[at]
        known = ~np.isnan(line)
        if known.all() or known.sum() < 2:
            continue
        inside = ~known & (points > points[known][0]) & (points < points[known][-1])
        line[inside] = np.interp(points[inside], points[known], line[known])
