"""Requests as the scheduler's policy sees them, and a policy over a clock that the test moves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_dler.config import SchedulerSettings
from vllm_dler.policy import LengthPolicy

_numbers = itertools.count()


@dataclass
class Params:
    """The sampling parameters that are read."""

    extra_args: dict[str, Any] | None = None
    temperature: float = 1.0
    thinking_token_budget: int | None = None


@dataclass(eq=False)
class Ask:
    """The attributes of vLLM's `Request` that are read; compared by identity, as those are."""

    arrival_time: float = 0.0
    num_prompt_tokens: int = 10
    max_tokens: int = 1000
    request_id: str = field(default_factory=lambda: f"r{next(_numbers)}")
    priority: int = 0
    xargs: dict[str, Any] | None = None
    num_output_tokens: int = 0
    num_computed_tokens: int = 0
    session_id: str | None = None
    lora_request: Any = None
    cache_salt: str | None = None
    prompt_token_ids: list[int] | None = None
    structured_output_request: Any = None
    kv_transfer_params: dict[str, Any] | None = None
    sampling_params: Params | None = None

    def __post_init__(self) -> None:
        self.sampling_params = self.sampling_params or Params(self.xargs)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Known:
    """In the place of `OnlineLengths`: it was told the length of every class: the first key's."""

    def __init__(self, lengths: Mapping[str, float]) -> None:
        self.lengths = dict(lengths)
        self.seen: list[tuple[tuple[str, ...], int, bool]] = []
        self.forgotten: list[str] = []
        self.turns = 0

    def heard(self, keys: Sequence[str]) -> tuple[str, ...]:
        return tuple(key for key in keys if key in self.lengths)

    def observe(self, keys: Sequence[str], tokens: int, *, censored: bool = False, **_: Any) -> None:
        self.seen.append((tuple(keys), tokens, censored))

    def remaining(self, keys: Sequence[str], age: int, cap: int, **_: Any) -> float | None:
        length = next((self.lengths[key] for key in keys if key in self.lengths), None)
        return None if length is None else max(min(length, cap) - age, 1.0)

    def forget(self, group: str) -> None:
        self.forgotten.append(group)


def policy(
    settings: dict[str, Any] | None = None, lengths: Any = None, clock: Clock | None = None, **options: Any
) -> LengthPolicy:
    return LengthPolicy(
        SchedulerSettings.model_validate({"rule": "kappa", "prefill_weight": 0.25} | (settings or {})),
        max_model_len=options.pop("max_model_len", 100_000),
        clock=clock or Clock(),
        lengths=lengths,
        **options,
    )


def of(name: str, arrival: float = 0.0, **options: Any) -> Ask:
    """A request of a class."""
    return Ask(arrival_time=arrival, xargs={"dler_class": name}, **options)
