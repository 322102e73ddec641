"""The `roles` section of a fleet file: how the controller decides, and the engine's limits by role."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vllm_suite.fleet.engine import Settings
from vllm_suite.roles.limits import RoleLimits

Number = Annotated[int, Field(ge=0, le=1024)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class Counts(Settings):
    """Instances by role."""

    encode: Number = Field(default=0, description="instances that encode; needs plugin `epd`")
    prefill: Number = Field(default=0, description="instances that prefill")
    decode: Number = Field(default=0, description="instances that decode")

    def of(self, role: str) -> int:
        """Of one role; 0 for those that are not named here."""
        return int(getattr(self, role, 0))


class Floor(Counts):
    """Instances that a role keeps."""

    encode: Number = Field(default=0, description="ready instances that encode")
    prefill: Number = Field(default=1, description="ready instances that prefill")
    decode: Number = Field(default=1, description="ready instances that decode")


class PredictSpec(Settings):
    """Where the goodput rule takes its predictions from. The targets are those of `slo`."""

    hardware: str = Field(min_length=1, description="as for `vllm-suite plan --gpus`, for example 8xH100")
    source: str = Field(
        default="roofline", description="of step times, as for `plan --source`: `roofline`, `calibrated=FILE`, ..."
    )
    attainment: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="share of requests that are to meet `slo`; `slo.attainment` where left out"
    )
    window: Seconds = Field(default=30.0, description="seconds of traffic that are looked at")
    horizon: Seconds = Field(default=300.0, description="seconds for which the traffic is expected to stay as it is")
    least_gain: Annotated[float, Field(ge=0, le=10)] = Field(
        default=0.05, description="gain that a switch has to bring after its cost, as a share of the goodput there is"
    )


class ScaleSpec(Settings):
    """The number of instances in `pools.any` on Kubernetes; needs `roles control --scale`."""

    gpus: Annotated[int, Field(ge=1)] = Field(description="that all instances of `pools.any` may have together")
    least: Annotated[int, Field(ge=1, le=1024)] = Field(default=2, description="instances that are kept")
    up_after: Seconds = Field(default=30.0, description="seconds in which requests wait and no switch would help")
    down_after: Seconds = Field(
        default=600.0, description="seconds in which one instance fewer would do; with rule goodput alone"
    )


class RolesSpec(Settings):
    """Role switching of the instances in `pools.any`. Nothing switches unless `vllm-suite roles control` runs."""

    control: bool = Field(default=False, description="`vllm-suite up` and the chart run the controller")
    start: Counts = Field(default=Counts(), description="roles given to instances that have none yet")
    floor: Floor = Field(default=Floor(), description="ready instances that a role keeps")
    limits: RoleLimits = Field(default=RoleLimits(), description="vLLM's limits of each role, below those of `engine`")
    rule: Literal["epd", "goodput"] = Field(
        default="epd",
        description="epd: the stage with the longest queue gets an instance; goodput: the planner's prediction decides",
    )
    predict: PredictSpec | None = Field(default=None, description="for rule goodput")
    scale: ScaleSpec | None = Field(default=None, description="more and fewer instances, after switching")
    every: Seconds = Field(default=1.0, description="seconds between two looks at the fleet")
    agree: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=5, description="looks in a row that have to ask for the same switch"
    )
    hold: Annotated[float, Field(ge=0, le=86_400)] = Field(
        default=30.0, description="seconds after a switch before the next; four times as long before the way back"
    )
    least_queue: Annotated[int, Field(ge=1)] = Field(
        default=4, description="requests that have to wait for a stage before it gets an instance; for rule epd"
    )

    @model_validator(mode="after")
    def _can_predict(self) -> RolesSpec:
        if self.rule == "goodput" and self.predict is None:
            raise ValueError("rule goodput needs `predict`: say at least {hardware: 8xH100}, or what it is")
        return self
