"""The file that a calibration writes: what was measured, what was fitted to it, and how far that is off."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_suite.planner.calibrate.fit import HeldOut
from vllm_suite.planner.calibrate.model import StepModel
from vllm_suite.planner.sources.base import SourceError

FORMAT = 1

Seconds = Annotated[float, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Coefficients(_Part):
    """`StepModel`, checked."""

    knots: tuple[Annotated[float, Field(ge=1)], ...] = Field(min_length=1)
    slopes: tuple[float, ...]
    constant: Seconds
    chunk: Seconds
    before: Seconds
    pair: Seconds
    sequence: Seconds
    key: Seconds

    def model(self) -> StepModel:
        """As the planner uses it. Raises SourceError where knots and slopes do not fit together."""
        rising = all(low < high for low, high in zip(self.knots, self.knots[1:], strict=False))
        if len(self.slopes) != len(self.knots) - 1 or not rising:
            raise SourceError(f"{len(self.knots)} knots, which have to rise, need one slope fewer")
        return StepModel(**self.model_dump())


class Bounds(_Part):
    """Between what the grid lay; the source answers nothing beyond without saying so.

    `context` is the mean over decoding sequences, `before` the mean over prompt chunks.
    """

    tokens: float
    sequences: float
    chunks: float
    before: float
    context_low: float
    context_high: float


class Errors(_Part):
    """`HeldOut`, in the file."""

    mean: float
    p90: float
    two_thirds: float
    bias: float
    worst: float
    worst_cell: str
    folds: int
    cells: int

    @classmethod
    def of(cls, found: HeldOut) -> Errors:
        """From a cross-validation."""
        return cls(**vars(found))


class CellRow(_Part):
    """One cell of the grid as it was measured."""

    name: str
    phase: str
    steps: tuple[float, ...]
    seconds: float
    samples: int
    spread: float


class Fitted(_Part):
    """One phase: the engine alone, or with others at work beside it."""

    step: Coefficients
    bounds: Bounds
    held_out: Errors
    residual_mean: float


class Serving(_Part):
    """What a served request sees beside the engine's steps, each in seconds.

    Attributes:
        step_s, sequence_s: added to a step, once and per sequence that gets a token: host work between steps, and the
            output path where it takes the engine's core.
        request_s, prompt_token_s: added to the time to the first token, once and per prompt token.
        requests: how many requests were measured.
        error: mean absolute error of both on their own measurements, as a share of the time measured.
        via: what stood between client and engine.
        router_s: how much later a first token comes through the router than from the engine; in `request_s` already.
        pull_s: mean time of a pull of keys and values, as the instance that decodes counts it; in `request_s` already.
        prompt_cpu_s: CPU seconds of a request beside the steps on the cores of the engine that computes its prompt: its
            HTTP server, and disaggregated router and client too. Added to the step of each prompt chunk, so that others
            wait for it as well; 0 where engines are not pinned to cores.
        answer_cpu_s: the same on the engine that decodes, where that is another one.
        busy_s: added to the time to the first token of a request that is not alone in the fleet: beyond the steps that
            it waits for, hops between processes wait for a core.
        shared_token_s: CPU seconds of router and client per token, on the cores that they share with the engines.
    """

    step_s: Seconds
    sequence_s: Seconds
    request_s: Seconds
    prompt_token_s: Seconds
    requests: int
    error: float
    via: str
    router_s: float | None = None
    pull_s: float | None = None
    prompt_cpu_s: Seconds = 0.0
    answer_cpu_s: Seconds = 0.0
    busy_s: Seconds = 0.0
    shared_token_s: float = 0.0
    points: list[dict[str, Any]] = []


class Calibration(_Part):
    """The whole file."""

    format: Literal[1] = 1
    model: str
    path: str = Field(default="", description="where the checkpoint was")
    device: str
    machine: str
    engine: dict[str, Any]
    facts: dict[str, Any]
    alone: Fitted
    beside: Fitted | None = Field(default=None, description="with `engines` - 1 others running the same grid")
    engines: int = 1
    serving: dict[str, Serving] = Field(default={}, description="by kind of fleet")
    grid: list[CellRow]
    odd_steps: int = Field(default=0, description="steps left out: they held something else than asked for")
    load_average: list[float] = []
    provenance: dict[str, Any] = {}

    def save(self, path: Path) -> None:
        """Write it as YAML, or as JSON where the name ends so."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
            return
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)
        path.write_text(text, encoding="utf-8")


def load(path: Path) -> Calibration:
    """Read a file. Raises SourceError: what is wrong with which key."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SourceError(f"{path}: {error}") from error
    try:
        return Calibration.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise SourceError(f"{path}: {where}: {first['msg']}; write it with vllm-suite calibrate") from error
