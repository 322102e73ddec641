"""Settings of the scheduler: the ``dler`` object inside ``--additional-config``.

Example::

    --additional-config '{"suite": {"dler": {"kappa": 0.05, "victims": {"max_evictions": 2}}}}'
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_suite.catalog import SelectionError
from vllm_suite.compat.additional import section
from vllm_suite.lengths import LengthSettings
from vllm_suite.plugin_config import checked

WHERE = "additional_config.suite.dler"


class Section(BaseModel):
    """Unknown keys are errors, and so are values of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class AdaptiveSettings(Section):
    """``kappa`` follows the load: down while the tail is out of bounds, up while short requests suffer."""

    enabled: bool = Field(default=False, description="Let kappa follow the load.")
    minimum: float = Field(default=0.002, gt=0, description="Seconds per token; kappa never goes below.")
    maximum: float = Field(default=0.2, gt=0, description="Seconds per token; kappa never goes above.")
    period_s: float = Field(default=5.0, gt=0, description="Seconds between two decisions.")
    window: int = Field(default=256, ge=16, description="Admissions that a decision looks back on.")
    tail_ratio: float = Field(
        default=1.5,
        ge=1,
        description="The 99th percentile of waiting may be so many times that of first come, first served.",
    )
    tail_s: float | None = Field(default=None, gt=0, description="A bound in seconds on that percentile instead.")
    short_ratio: float = Field(
        default=4.0,
        ge=1,
        description="Short requests suffer where they wait so many times longer, per token, than long ones.",
    )
    step: float = Field(default=1.25, gt=1, description="Factor of one change.")

    @model_validator(mode="after")
    def _ordered(self) -> AdaptiveSettings:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum {self.minimum:g} is above maximum {self.maximum:g}")
        return self


class BoostSettings(Section):
    """Rule ``boost``: requests smaller than most go forward."""

    strength: float = Field(default=0.9, ge=0, description="Scale of the boost, in latencies of the slowest requests.")
    max_boost_s: float = Field(default=300.0, gt=0, description="Seconds that no request goes forward by more than.")


class VictimSettings(Section):
    """Who gives way when the KV cache is full: who has most to generate for each token to be computed again."""

    enabled: bool = Field(default=True, description="False: vLLM's own choice, the request that was admitted last.")
    max_evictions: int = Field(
        default=3, ge=1, description="After so many a request gives way only where nobody else is left."
    )
    min_run: int = Field(
        default=0, ge=0, description="Tokens a request generates after each admission before it may give way again."
    )
    growth: float = Field(default=2.0, ge=1, description="`min_run` grows so many times with each eviction.")


class GateSettings(Section):
    """Admit a request only where the KV cache is expected to hold all that runs, to its end."""

    enabled: bool = Field(default=False, description="Admit by the expected peak.")
    usage: float = Field(default=0.95, gt=0, le=1, description="Share of the KV cache that the expected peak may take.")


class GroupSettings(Section):
    """Samples of one prompt (``n``, or equal ``dler_group`` in ``vllm_xargs``) are one unit of work."""

    enabled: bool = Field(default=True, description="False: samples are requests like others.")
    probe: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="The first sample of a group counts as so many times its size, to start early.",
    )
    stop_after: bool = Field(default=True, description="Heed `dler_stop_after` in `vllm_xargs`.")


class ClassSettings(Section):
    """What requests are taken to have alike lengths; the most specific with enough observations answers."""

    prefix_tokens: int = Field(
        default=256, ge=0, description="Requests with the same first so many tokens are one class; 0 for none."
    )
    same_prompt: bool = Field(
        default=False, description="Requests with the same whole prompt are one class, the first of all."
    )
    max_labels: int = Field(default=32, ge=1, description="Values of `dler_class` that metrics tell apart.")


class SchedulerSettings(Section):
    """How waiting requests are ordered. The smallest key goes first."""

    rule: Literal["boost", "kappa"] = Field(
        default="boost", description="How a request's size moves it: a bounded boost, or kappa."
    )
    kappa: float = Field(default=0.02, ge=0, description="Rule `kappa`: seconds that a token of size is worth.")
    boost: BoostSettings = BoostSettings()
    prefill_weight: float = Field(
        default=0.2, ge=0, description="Size of a prompt token that is not cached, in generated tokens."
    )
    headroom_tokens: int = Field(
        default=64,
        ge=0,
        description="Tokens of KV cache, at most, left free for each running request to grow into at an admission.",
    )
    headroom_share: float = Field(
        default=0.1,
        ge=0,
        description="Share of a running request's expected output that is left free so; 16 tokens if unknown.",
    )
    relearn_every: int = Field(default=32, ge=1, description="Finished requests until waiting ones are looked at anew.")
    relearn_s: float = Field(default=1.0, gt=0, description="Or so many seconds, where any has finished.")
    adaptive: AdaptiveSettings = AdaptiveSettings()
    victims: VictimSettings = VictimSettings()
    gate: GateSettings = GateSettings()
    groups: GroupSettings = GroupSettings()
    classes: ClassSettings = ClassSettings()
    caps: dict[str, int] = Field(
        default={},
        description="Output tokens by `dler_class`, '*' for all others: longer answers end with reason `length`.",
    )
    state_file: str | None = Field(
        default=None,
        min_length=1,
        description="What was learned is kept here over restarts; `.N` is added for engine N of several.",
    )
    lengths: LengthSettings = LengthSettings()

    @model_validator(mode="after")
    def _consistent(self) -> SchedulerSettings:
        for name, cap in self.caps.items():
            if cap < 1:
                raise ValueError(f"caps.{name} must be at least 1, not {cap}")
        if self.adaptive.enabled and self.rule != "kappa":
            raise ValueError('adaptive is for rule "kappa"; rule "boost" follows the load by itself')
        if self.adaptive.enabled and not self.adaptive.minimum <= self.kappa <= self.adaptive.maximum:
            raise ValueError(
                f"kappa {self.kappa:g} is not between adaptive.minimum {self.adaptive.minimum:g} and adaptive.maximum "
                f"{self.adaptive.maximum:g}"
            )
        return self

    @property
    def reorders(self) -> bool:
        """False where vLLM's own queues, victims and admission are left alone."""
        return self.worth > 0

    @property
    def worth(self) -> float:
        """The one number of the rule; 0 is the order of arrival."""
        return self.kappa if self.rule == "kappa" else self.boost.strength

    @classmethod
    def of(cls, config: Any) -> SchedulerSettings:
        """From vLLM's `VllmConfig` or `EngineArgs`: whatever carries ``additional_config``.

        Raises:
            SelectionError: an unknown key or a wrong value; the text names the key.
        """
        return checked(cls, section(config.additional_config, "dler"), WHERE, SelectionError)
