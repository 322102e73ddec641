"""First tokens while the engines decode: what a request waits for beside the steps that the simulator knows of.

When every core is at work each hop (router, HTTP server, engine, and back) waits for a turn on it, so a first token
comes later than from an idle fleet by more than the rest of the step under way and the longer step of its own.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

from vllm_suite.planner.calibrate.client import Ask, Client, ServedError
from vllm_suite.planner.calibrate.file import Serving
from vllm_suite.planner.calibrate.model import StepModel
from vllm_suite.planner.calibrate.probe import Probe, decode_seconds
from vllm_suite.planner.sources.steps import Steps

STREAM = 160
"""Tokens of the streams in the background."""

# Steps that a stream decodes before the first request comes, and between requests at least and at most.
_SETTLE, _LEAST, _MOST = 12, 1.5, 8.0
# Of the waits this share is left out at either end: hiccups of the machine.
_TRIM = 0.1


async def first_tokens_under_load(client: Client, probe: Probe, gap_s: float) -> list[tuple[int, float]]:
    """Prompt lengths and seconds to the first token of single requests while each engine decodes one stream.

    Args:
        gap_s: about one step of such a stream.

    Raises:
        ServedError: a request failed, or the streams ended before any request was answered.
    """
    draw = random.Random(probe.seed + 3)
    sizes, found = probe.prompts[:3], list[tuple[int, float]]()
    for _ in range(probe.rounds):
        streams = [Ask(probe.draw(draw, probe.batch_prompt), STREAM) for _ in range(probe.width)]
        background = asyncio.ensure_future(client.send(streams))
        try:
            await asyncio.sleep(_SETTLE * gap_s)
            while not background.done():
                size = draw.choice(sizes)
                [timed] = await client.send([Ask(probe.draw(draw, size), 2)])
                if not background.done():
                    found.append((size, timed.ttft))
                await asyncio.sleep(draw.uniform(_LEAST, _MOST) * gap_s)
        finally:
            await background
    if not found:
        raise ServedError(f"streams of {STREAM} tokens ended before any prompt was answered beside them")
    return found


def expected_under_load(
    length: int, probe: Probe, served: Serving, model: StepModel, *, handed_over: bool = False
) -> float:
    """What the steps and the constants of an idle fleet say of such a request.

    Args:
        model: of steps while the other engines are at work.
        handed_over: as of `fit_serving`.
    """
    stream, step_s = Steps.of(contexts=[probe.batch_prompt + STREAM // 2]), served.step_s
    # It comes at any moment of a step.
    rest = (decode_seconds(model, probe, 1) + step_s + served.sequence_s) / 2
    beside, sequences = (Steps(), 1) if handed_over else (stream, 2)
    seconds, before = 0.0, 0
    while before < length:
        chunk = min(probe.budget, length - before)
        seconds += model.step_seconds(together(Steps.of([(chunk, before)]), beside))
        seconds += step_s + sequences * served.sequence_s + served.prompt_cpu_s
        before += chunk
    if handed_over:
        seconds += model.step_seconds(together(Steps.of([(1, length - 1)]), stream))
        seconds += step_s + 2 * served.sequence_s + served.answer_cpu_s
    return rest + seconds + served.request_s + served.prompt_token_s * length


def together(prompts: Steps, decoding: Steps) -> Steps:
    """One step of prompt chunks and of decoding sequences."""
    return decoding._replace(
        prefill_tokens=prompts.prefill_tokens,
        prefill_chunks=prompts.prefill_chunks,
        prefill_context=prompts.prefill_context,
        prefill_pairs=prompts.prefill_pairs,
    )


def with_load(
    found: Sequence[tuple[int, float]], probe: Probe, served: Serving, model: StepModel, *, handed_over: bool = False
) -> Serving:
    """The constants with `busy_s`: the mean of what is left of the measured times, at least 0."""
    left = sorted(
        seconds - expected_under_load(length, probe, served, model, handed_over=handed_over)
        for length, seconds in found
    )
    cut = int(_TRIM * len(left))
    busy = max(0.0, statistics.fmean(left[cut : len(left) - cut]))
    points = [*served.points, {"beside_streams": len(left), "left_s": [round(each, 5) for each in left]}]
    return served.model_copy(update={"busy_s": busy, "points": points, "requests": served.requests + len(left)})


def unpaused(probe: Probe) -> Probe:
    """The same without waiting between requests."""
    return replace(probe, pause_s=(0.0, 0.0))
