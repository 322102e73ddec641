"""What is asked of a fleet, and what the model of its engines' steps says of that."""

from __future__ import annotations

import random
from dataclasses import dataclass

from vllm_suite.planner.calibrate.model import StepModel
from vllm_suite.planner.sources.steps import Steps

EDGE = 6
"""Tokens of a stream before its batch is complete and steady, and at its end."""


@dataclass(frozen=True)
class Probe:
    """What is asked of a fleet.

    Attributes:
        prompts: lengths; each is sent alone, `repeats` times.
        batches: requests at a time for each engine that decodes.
        width: engines that decode, each with its share of a batch.
        budget: `max_num_batched_tokens`.
        output: tokens of each request of a batch.
        batch_prompt: their prompt.
        token_ids: to draw prompts from.
        pause_s: without work before a prompt that is sent alone, at least and at most, as requests of light traffic
            come: right after another one a prompt finds everything awake.
    """

    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    width: int
    budget: int
    token_ids: range
    repeats: int = 6
    output: int = 32
    batch_prompt: int = 24
    seed: int = 0
    pause_s: tuple[float, float] = (0.2, 0.6)

    @property
    def rounds(self) -> int:
        """How often what takes longer is repeated."""
        return max(2, self.repeats // 2)

    def draw(self, draw: random.Random, size: int) -> tuple[int, ...]:
        """A prompt."""
        return tuple(draw.choices(self.token_ids, k=size))


def decode_seconds(model: StepModel, probe: Probe, size: int) -> float:
    """The model's own time of such a step, in the middle of the stream."""
    context = probe.batch_prompt + (probe.output + EDGE) / 2
    return model.step_seconds(Steps(0, 0, 0, 0, size, size * context))


def prompt_seconds(model: StepModel, tokens: int, budget: int) -> tuple[float, int]:
    """The model's own time of a prompt alone, and in how many steps."""
    seconds, before, steps = 0.0, 0, 0
    while before < tokens:
        length = min(budget, tokens - before)
        seconds += model.step_seconds(Steps.of([(length, before)]))
        before, steps = before + length, steps + 1
    return seconds, steps
