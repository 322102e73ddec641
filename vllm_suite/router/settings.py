"""The base of every settings class of the router, and the kinds of numbers they hold."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Count = Annotated[int, Field(ge=0)]
Bytes = Annotated[int, Field(gt=0)]


class Settings(BaseModel):
    """Frozen; unknown keys are errors, and errors leave the given value out: it may be a key."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
