"""State of the estimator as plain data and as a file: JSON of a fixed schema, checked when it is read."""

from __future__ import annotations

import os
from array import array
from math import isfinite
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from vllm_suite.lengths.sketch import MAX_BINS, Sketch, edges

FORMAT = "vllm-suite-lengths"
VERSION = 1
# A bin's mean may lie outside of it by the rounding of sums.
_ROUNDING = 1e-6


class StateError(ValueError):
    """A state that is torn, of another format or of another version; the message says which."""


class FileOutcome(NamedTuple):
    """What came of reading or writing a state file; `outcome` may label a metric."""

    outcome: Literal["ok", "missing", "failed"]
    reason: str = ""


class SketchState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `Sketch`. The columns are equally long; an observation made at `last` has the weight `unit`."""

    bins: list[Annotated[int, msgspec.Meta(ge=0, lt=MAX_BINS)]]
    exact: list[float]
    exact_sums: list[float]
    censored: list[float]
    censored_sums: list[float]
    unit: float
    count: Annotated[int, msgspec.Meta(ge=0)]
    last: float

    @classmethod
    def of(cls, sketch: Sketch) -> SketchState:
        """Copy one."""
        return cls(
            sketch.bins.tolist(),
            sketch.exact.tolist(),
            sketch.exact_sums.tolist(),
            sketch.censored.tolist(),
            sketch.censored_sums.tolist(),
            sketch.unit,
            sketch.count,
            sketch.last,
        )

    def sketch(self, name: str) -> Sketch:
        """The sketch. Raises `StateError`, which says what of `name` cannot be."""
        columns = (self.exact, self.exact_sums, self.censored, self.censored_sums)
        if any(len(column) != len(self.bins) for column in columns):
            raise StateError(f"{name}: columns of different lengths")
        if any(low >= high for low, high in zip(self.bins, self.bins[1:], strict=False)):
            raise StateError(f"{name}: bins out of order")
        for weights, sums in (columns[:2], columns[2:]):
            for index, weight, total in zip(self.bins, weights, sums, strict=True):
                low, high = edges(index)
                slack = _ROUNDING * (high + 1.0)
                if not (isfinite(weight) and weight >= 0.0 and isfinite(total)) or not (
                    (low - slack) * weight <= total <= (high + slack) * weight
                ):
                    raise StateError(f"{name}: bin {index} holds weight {weight} and {total} tokens, which cannot be")
        if not isfinite(self.last):
            raise StateError(f"{name}: a time that is no number")
        if not (isfinite(self.unit) and self.unit > 0.0):
            raise StateError(f"{name}: a unit of {self.unit}, which no weight can have")
        made = Sketch()
        made.bins = array("H", self.bins)
        made.exact, made.exact_sums, made.censored, made.censored_sums = (array("d", column) for column in columns)
        made.unit, made.count, made.last = self.unit, self.count, self.last
        return made


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All an estimator has learned; the keys from the one unused for longest to the newest."""

    format: str
    version: int
    all: SketchState
    keys: dict[str, SketchState]


class _Head(msgspec.Struct):
    format: str = ""
    version: int = 0


def parse(raw: Any) -> State:
    """Plain data, as `to_dict` gives it and JSON reads it. Raises `StateError`."""
    try:
        head = msgspec.convert(raw, _Head)
        if head.format != FORMAT:
            raise StateError(f"not a state of output lengths: its format is {head.format!r}, not {FORMAT!r}")
        if head.version != VERSION:
            raise StateError(f"version {head.version} of the state, and this release reads {VERSION}")
        return msgspec.convert(raw, State)
    except msgspec.ValidationError as exc:
        raise StateError(f"not a state of output lengths: {exc}") from exc


def write(path: Path, state: State) -> None:
    """Replace the file in one step, so that a reader sees the old or the new one. Raises OSError."""
    body = msgspec.json.encode(state)
    with NamedTemporaryFile(dir=path.parent, prefix=path.name + ".", delete=False) as file:
        try:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def read(path: Path) -> State:
    """Raises `StateError` and OSError, FileNotFoundError among them."""
    try:
        return parse(msgspec.json.decode(path.read_bytes()))
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise StateError(f"torn or no JSON: {exc}") from exc
