"""From ``--source`` to the step times of every pool of a plan, each source made once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vllm_suite.media.families import Encoder
from vllm_suite.media.tokens import ImageCost
from vllm_suite.planner.hardware import Cluster
from vllm_suite.planner.models import Model, ModelError, Parallel, Quantization, prefill_only
from vllm_suite.planner.plan import PoolPlan
from vllm_suite.planner.sources.base import FloatArray, LatencySource, Load, Outside, SourceError, Uncertainty
from vllm_suite.planner.sources.roofline import RooflineSource
from vllm_suite.planner.sources.steps import DecodeLine, Steps
from vllm_suite.planner.workload import Item

if TYPE_CHECKING:
    from vllm_suite.planner.calibrate.served import Constants
    from vllm_suite.planner.sources.aic import AicSource
    from vllm_suite.planner.sources.calibrated import CalibratedSource


class Tower(Protocol):
    """What knows the seconds of items on an encoder: a source."""

    outside: Outside

    def encode_seconds(self, items: Iterable[ImageCost]) -> float:
        """Of a batch of them."""
        ...


SOURCES = ("roofline", "tables=FOLDER", "aic", "aic=SYSTEM", "calibrated=FILE")

Make = Callable[[Model, Quantization, Parallel], LatencySource]
"""A source for a model as an engine holds it."""


Encoders = Callable[[Model, Quantization, Parallel], Tower]
"""A model's encoder as an engine holds it."""


class Sources:
    """Step times of pools. Called with a pool; `encode` gives the seconds of an item on one of its encoders.

    Args:
        make: see `Make`.
        model, quant: of the checkpoint; a pool's own formats take precedence.
        scale: every time is multiplied by it.
        encoders: times of items; None for the roofline's.
    """

    def __init__(
        self,
        make: Make,
        model: Model,
        quant: Quantization,
        cluster: Cluster,
        *,
        scale: float = 1.0,
        encoders: Encoders | None = None,
    ) -> None:
        self.make, self.model, self.quant, self.cluster, self.scale = make, model, quant, cluster, scale
        self.encoders = encoders or encoder_maker("roofline", cluster)
        self._made: dict[tuple[Parallel, Quantization, bool], LatencySource] = {}
        self._towers: dict[tuple[Parallel, Quantization], Tower] = {}
        self.unknown: dict[str, PoolPlan] = {}
        self._items: dict[tuple[Parallel, Quantization, str], float] = {}

    def __call__(self, pool: PoolPlan) -> LatencySource:
        """Raises SourceError, ModelError: the source does not know this cut."""
        quant = pool.quant or self.quant
        key = (pool.parallel, quant, pool.late_kv_only)
        if key not in self._made:
            model = prefill_only(self.model) if pool.late_kv_only else self.model
            made = self.make(model, quant, pool.parallel)
            self._made[key] = made if self.scale == 1 else Scaled(made, self.scale)
        return self._made[key]

    def knows(self, pool: PoolPlan) -> bool:
        """Whether the source has this cut. What it does not know is no part of a space."""
        if pool.role == "encode":
            return True
        try:
            self(pool)
        except (SourceError, ModelError) as error:
            self.unknown.setdefault(str(error), pool)
            return False
        return True

    def encode(self, pool: PoolPlan, item: Item) -> float:
        """Seconds of an item alone. Raises SourceError: the source does not know this encoder."""
        quant = pool.quant or self.quant
        key = (pool.parallel, quant, item.kind)
        if key not in self._items:
            encoder = self.model.encoder
            if encoder is None:
                raise SourceError(f"{self.model.name} has no encoder")
            where = (Parallel(tp=pool.parallel.tp, encoder_data=pool.parallel.encoder_data), quant)
            if where not in self._towers:
                self._towers[where] = self.encoders(self.model, quant, where[0])
            self._items[key] = self.scale * self._towers[where].encode_seconds([item_cost(encoder, item.kind)])
        return self._items[key]

    def scaled(self, factor: float) -> Sources:
        """The same with every time multiplied: the ends of an error bar."""
        return Sources(
            self.make, self.model, self.quant, self.cluster, scale=self.scale * factor, encoders=self.encoders
        )

    def outside(self) -> dict[str, dict[str, Any]]:
        """What was asked beyond the sources' ranges, by axis, over all of them."""
        found: dict[str, dict[str, Any]] = {}
        every: list[LatencySource | Tower] = [*self._made.values(), *self._towers.values()]
        for source in every:
            for axis, entry in source.outside.report().items():
                known = found.get(axis)
                if known is None:
                    found[axis] = dict(entry)
                else:
                    known["steps"] += entry["steps"]
                    known["furthest"] = max(known["furthest"], entry["furthest"])
        return found

    @property
    def uncertainty(self) -> Uncertainty:
        """The widest of those that were made. Raises SourceError where none was."""
        if not self._made:
            raise SourceError("no source was asked yet")
        return max((source.uncertainty for source in self._made.values()), key=lambda each: each.relative)

    @property
    def names(self) -> list[str]:
        """Of the sources that were made."""
        return sorted({source.name for source in self._made.values()})


class Scaled(LatencySource):
    """Another source's times multiplied by a factor; its range and its count of what lies outside are the other's."""

    def __init__(self, inner: LatencySource, factor: float) -> None:
        self.inner, self.factor = inner, factor
        self.name, self.stages = f"{inner.name} x {factor:g}", inner.stages
        self.uncertainty, self.outside = inner.uncertainty, inner.outside

    def step_seconds(self, steps: Steps) -> float:
        """See `LatencySource`."""
        return self.factor * self.inner.step_seconds(steps)

    def seconds(self, steps: Steps) -> FloatArray:
        """See `LatencySource`."""
        return self.factor * self.inner.seconds(steps)

    def stage_seconds(self, steps: Steps) -> float:
        """See `LatencySource`."""
        return self.factor * self.inner.stage_seconds(steps)

    def host_seconds(self, sequences: int) -> float:
        """See `LatencySource`."""
        return self.factor * self.inner.host_seconds(sequences)

    def decode_line(self, sequences: int, context: float, longest: float = 0, shortest: float = 0) -> DecodeLine:
        """See `LatencySource`."""
        line = self.inner.decode_line(sequences, context, longest, shortest)
        return replace(line, seconds=self.factor * line.seconds, slope=self.factor * line.slope)

    def loaded(self, load: Load) -> Scaled:
        """See `LatencySource`."""
        return Scaled(self.inner.loaded(load), self.factor)


def source_maker(text: str, cluster: Cluster, *, host_us: float = 0.0) -> Make:
    """What ``--source`` names.

    Args:
        host_us: of the host in every step, which `aic` and `tables` do not have.

    Raises:
        SourceError: no such source, or one without the path that it needs; while it is asked: what it does not know.
    """
    kind, _, path = text.partition("=")
    if host_us and kind not in ("aic", "tables"):
        raise SourceError(f"a host time is for aic and tables; {kind} has its own")
    if kind == "roofline" and not path:
        return lambda model, quant, parallel: RooflineSource(model, quant, parallel, cluster)
    if kind == "tables" and path:
        return _tables(Path(path), cluster, host_us)
    if kind == "aic":
        return _aic(path, cluster, host_us)
    if kind == "calibrated" and path:
        return _calibrated(Path(path), cluster)
    raise SourceError(f"no source {text!r}; there are {', '.join(SOURCES)}")


def encoder_maker(text: str, cluster: Cluster, *, host_us: float = 0.0) -> Encoders:
    """Times of items for what ``--source`` names: `aic` has its own, for the others they are the roofline's."""
    kind, _, path = text.partition("=")
    if kind == "aic":
        return _aic(path, cluster, host_us, max_tokens=16)
    return lambda model, quant, parallel: RooflineSource(model, quant, parallel, cluster, max_tokens=16)


def _tables(folder: Path, cluster: Cluster, host_us: float) -> Make:
    from vllm_suite.planner.hardware.collectives import Collectives
    from vllm_suite.planner.sources.tables import TableSource

    if not folder.is_dir():
        raise SourceError(f"tables: no folder {folder}")
    collectives = Collectives(cluster)
    return lambda model, quant, parallel: TableSource(
        profile(folder, model, quant), model, parallel, collectives=collectives, step_us=host_us
    )


def profile(folder: Path, model: Model, quant: Quantization) -> Path:
    """Where the tables of a model are: the folder itself, or ``MODEL/FORMAT`` in the folder of a device.

    Raises:
        SourceError: neither has a ``meta.yaml``.
    """
    inside = folder / model.name / quant.weights
    found = next((each for each in (folder, inside) if (each / "meta.yaml").is_file()), None)
    if found is None:
        raise SourceError(f"tables: no meta.yaml in {folder}, and none in {inside}")
    return found


def _aic(
    system: str, cluster: Cluster, host_us: float, max_tokens: int = 16_384
) -> Callable[[Model, Quantization, Parallel], AicSource]:
    from vllm_suite.planner.sources.aic import AicSource
    from vllm_suite.planner.sources.aic_tables import AicTables

    tables = AicTables.of(system or cluster.device.name)
    return lambda model, quant, parallel: AicSource(
        model, quant, parallel, tables, step_us=host_us, max_tokens=max_tokens
    )


def _calibrated(path: Path, cluster: Cluster) -> Make:
    from vllm_suite.planner.sources.base import Outside
    from vllm_suite.planner.sources.calibrated import CalibratedSource

    found = _calibration(path)
    engine = found.calibration.engine
    sizes = [int(engine.get(f"{kind}_parallel_size") or 1) for kind in ("tensor", "pipeline", "data")]

    def make(model: Model, quant: Quantization, parallel: Parallel) -> LatencySource:
        if [parallel.tp, parallel.pp, parallel.dp] != sizes:
            tp, pp, dp = sizes
            raise SourceError(f"{path}: measured with tp {tp}, pp {pp}, dp {dp} alone")
        return CalibratedSource(found.calibration, outside=Outside("clamp"))

    return make


def measured(text: str, *names: str) -> dict[str, Any]:
    """Settings of the engine that a ``calibrated`` source was measured on; none of another source.

    Args:
        names: of the model that is asked for: as it was given, and as its config has it.

    Raises:
        SourceError: the file is missing or not one, or was measured with another model.
    """
    kind, _, path = text.partition("=")
    if kind != "calibrated" or not path:
        return {}
    found = _calibration(Path(path)).calibration
    if not _aliases(found.model, found.path) & _aliases(*names):
        raise SourceError(
            f"{path}: measured with {found.path or found.model}, not with {names[0]}; calibrate {names[0]}, or name the"
            " model that was measured"
        )
    return dict(found.facts)


def _aliases(*names: str) -> set[str]:
    """A checkpoint by its last name: folders move, and hub names have an owner or not."""
    found = (Path(each).parent if each.endswith(".json") else Path(each) for each in names if each)
    return {(each.name or each.resolve().name).lower() for each in found}


def constants(text: str) -> Constants | None:
    """What a ``calibrated`` source has beside steps; None of another source. Raises SourceError."""
    from vllm_suite.planner.calibrate.served import Constants

    kind, _, path = text.partition("=")
    return Constants(_calibration(Path(path)).calibration) if kind == "calibrated" and path else None


def _calibration(path: Path) -> CalibratedSource:
    from vllm_suite.planner.sources.calibrated import CalibratedSource

    if not path.is_file():
        raise SourceError(f"calibrated: no file {path}; write it with vllm-suite calibrate")
    return CalibratedSource.load(path)


@cache
def item_cost(encoder: Encoder, kind: str) -> ImageCost:
    """Tiles, patches and tokens of an item by its kind, see `vllm_suite.planner.traces.item_of`."""
    if kind.endswith("s"):
        if encoder.sound is None:
            raise ModelError(f"item {kind}: the model takes no sound")
        return encoder.sound(float(kind[:-1]))
    sizes = [int(part) for part in re.split("x", kind)]
    if len(sizes) == 3:
        return encoder.video(*sizes)
    if encoder.image is None:
        raise ModelError(f"item {kind}: the model takes no images")
    return encoder.image(*sizes)
