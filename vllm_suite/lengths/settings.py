"""Settings of the estimator."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class LengthSettings(BaseModel):
    """Frozen; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_observations: Annotated[int, Field(ge=1)] = Field(
        default=1, description="observations below which a key counts as unknown and the next one answers"
    )
    max_keys: Annotated[int, Field(ge=1)] = Field(
        default=1024, description="keys remembered; the one unused for longest is forgotten"
    )
    half_life_observations: Annotated[float, Field(gt=0)] | None = Field(
        default=100.0, description="an observation weighs half after so many later ones of its key; null never"
    )
    half_life_s: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="an observation weighs half after so many seconds; null never"
    )
    shrinkage: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="observations of its own with which a key has half the say, its successor the rest"
    )
    max_groups: Annotated[int, Field(ge=1)] = Field(default=1024, description="groups of samples under way")
    sibling_correlation: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.76, description="intra-class correlation of log lengths of one prompt's samples, to begin with"
    )
    tail_index: Annotated[float, Field(gt=1)] = Field(
        default=2.0, description="Pareto index of the tail assumed past the largest length observed anywhere"
    )
