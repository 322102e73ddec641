"""What a served request sees beside its engine's steps: HTTP, tokenizing, the router, the hand-over, host work."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vllm_suite.planner.calibrate.client import Ask, Client, ServedError, Timed
from vllm_suite.planner.calibrate.file import Calibration, Serving
from vllm_suite.planner.calibrate.fit import nonnegative
from vllm_suite.planner.calibrate.fleets import SERVED, Kind, Running, running, spec
from vllm_suite.planner.calibrate.loaded import first_tokens_under_load, unpaused, with_load
from vllm_suite.planner.calibrate.measure import Options, token_ids
from vllm_suite.planner.calibrate.model import StepModel
from vllm_suite.planner.calibrate.probe import EDGE, Probe, decode_seconds, prompt_seconds
from vllm_suite.planner.sources.base import FloatArray
from vllm_suite.planner.sources.steps import Steps

# Over which the fleet's own CPU time without requests is measured.
_IDLE_S = 4.0
_PULLS = "vllm_suite_kv_pull_seconds"


async def first_tokens(client: Client, probe: Probe) -> dict[int, list[float]]:
    """Seconds to the first token by prompt length, one request at a time, in random order."""
    draw = random.Random(probe.seed)
    order = [size for size in probe.prompts for _ in range(probe.repeats)]
    draw.shuffle(order)
    found: dict[int, list[float]] = {size: [] for size in probe.prompts}
    for size in order:
        await asyncio.sleep(draw.uniform(*probe.pause_s))
        [timed] = await client.send([Ask(probe.draw(draw, size), 2)])
        found[size].append(timed.ttft)
    return found


async def batch_gaps(client: Client, probe: Probe) -> dict[int, list[float]]:
    """Seconds between tokens while so many requests decode on each engine, in random order.

    Raises:
        ServedError: streams of less than two sizes were ever all at work at once.
    """
    draw = random.Random(probe.seed + 1)
    order = [size for size in probe.batches for _ in range(probe.rounds)]
    draw.shuffle(order)
    found: dict[int, list[float]] = {size: [] for size in probe.batches}
    for size in order:
        asks = [Ask(probe.draw(draw, probe.batch_prompt), probe.output) for _ in range(size * probe.width)]
        gap = steady_gap(await client.send(asks))
        if gap is not None:
            found[size].append(gap)
    seen = {size: gaps for size, gaps in found.items() if gaps}
    if len(seen) < 2:
        raise ServedError(
            f"streams of {probe.output} tokens were never all at work at once, but for {len(seen)} of the"
            f" {len(found)} sizes {', '.join(map(str, found))}: other work takes the machine's cores"
        )
    return seen


def steady_gap(answers: Sequence[Timed]) -> float | None:
    """The mean gap while all of them decode; the mean over the requests. None where that is no two gaps long."""
    begun = max(each.at[EDGE] for each in answers)
    ended = min(each.at[-1] for each in answers)
    gaps = []
    for each in answers:
        inside = [at for at in each.at if begun <= at <= ended]
        if len(inside) > 2:
            gaps.append((inside[-1] - inside[0]) / (len(inside) - 1))
    return statistics.fmean(gaps) if gaps else None


def fit_serving(
    first: dict[int, list[float]],
    gaps: dict[int, list[float]],
    probe: Probe,
    decode: StepModel,
    prefill: StepModel,
    via: str,
    *,
    handed_over: bool = False,
    prompt_cpu_s: float = 0.0,
    answer_cpu_s: float = 0.0,
) -> Serving:
    """Constants from both measurements: what is left when the engine's own steps are taken off.

    Args:
        decode: the model of steps of the engines while all of them decode.
        prefill: of an engine while the others are idle.
        handed_over: the first token comes from another engine, which computes the prompt's last token again.
        prompt_cpu_s, answer_cpu_s: see `Serving`.
    """
    sizes = sorted(gaps)
    seen = np.array([statistics.median(gaps[size]) for size in sizes])
    own = np.array([decode_seconds(decode, probe, size) for size in sizes])
    step_s, sequence_s = _affine(np.array(sizes, dtype=float), seen - own, seen)
    lengths = sorted(first)
    ttft = np.array([statistics.median(first[length]) for length in lengths])

    def engine_seconds(length: int) -> float:
        seconds, steps = prompt_seconds(prefill, length, probe.budget)
        seconds += steps * (step_s + prompt_cpu_s) + sequence_s
        if handed_over:
            seconds += prefill.step_seconds(Steps.of([(1, length - 1)])) + step_s + sequence_s + answer_cpu_s
        return seconds

    engine = np.array([engine_seconds(length) for length in lengths])
    request_s, prompt_s = _affine(np.array(lengths, dtype=float), ttft - engine, ttft)
    predicted_gap = own + step_s + sequence_s * np.array(sizes)
    predicted_ttft = engine + request_s + prompt_s * np.array(lengths)
    errors = np.concatenate([predicted_gap / seen - 1, predicted_ttft / ttft - 1])
    points: list[dict[str, Any]] = [
        {"decoding": size, "gap_s": float(one), "steps_s": float(two)}
        for size, one, two in zip(sizes, seen, own, strict=True)
    ]
    points += [
        {"prompt": length, "ttft_s": float(one), "steps_s": float(two)}
        for length, one, two in zip(lengths, ttft, engine, strict=True)
    ]
    count = sum(map(len, first.values())) + sum(len(gaps[size]) * size * probe.width for size in sizes)
    return Serving(
        step_s=step_s,
        sequence_s=sequence_s,
        request_s=request_s,
        prompt_token_s=prompt_s,
        requests=count,
        error=float(np.abs(errors).mean()),
        via=via,
        prompt_cpu_s=prompt_cpu_s,
        answer_cpu_s=answer_cpu_s,
        points=points,
    )


def _affine(size: FloatArray, left: FloatArray, whole: FloatArray) -> tuple[float, float]:
    """Constant and slope, at least 0, of what is left, by errors relative to the whole."""
    matrix = np.stack([np.ones_like(size), size], axis=1) / whole[:, None]
    constant, slope = nonnegative(matrix, left / whole)
    return float(constant), float(slope)


async def measure_fleet(
    fleet: Running,
    kind: Kind,
    calibration: Calibration,
    *,
    width: int,
    repeats: int = 10,
    say: Callable[[str], None] = lambda text: None,
) -> Calibration:
    """Constants of a running fleet, added to the calibration. Raises ServedError.

    Args:
        width: engines that decode.
    """
    facts, handed_over = calibration.facts, kind == "disaggregated"
    alone = calibration.alone.step.model()
    # While all of them decode, each has the others at work beside it.
    beside = calibration.beside if width > 1 else None
    decode = alone if beside is None else beside.step.model()
    budget, most = facts["max_num_batched_tokens"], facts["max_num_seqs"]
    longest = min(2 * budget, facts["max_model_len"] - 64)
    probe = Probe(
        prompts=tuple(sorted({min(longest, size) for size in (16, budget // 5, budget // 2, budget - 32, longest)})),
        batches=tuple(size for size in (1, 2, 4, 8) if size <= most),
        width=width,
        budget=budget,
        token_ids=range(*token_ids(calibration.path)),
        repeats=repeats,
        seed=len(kind),
    )
    async with Client(fleet.url, SERVED) as client:
        await first_tokens(client, unpaused(replace(probe, repeats=1, seed=probe.seed + 7)))
        before = await _pulls(fleet) if handed_over else (0.0, 0.0)
        idle = await _cpu_of(fleet, asyncio.sleep(_IDLE_S))
        first, begun = {}, time.monotonic()

        async def alone_() -> None:
            first.update(await first_tokens(client, probe))

        used = await _cpu_of(fleet, alone_())
        cpu = _request_cpu(used, idle, time.monotonic() - begun, sum(map(len, first.values())), handed_over)
        after = await _pulls(fleet) if handed_over else (0.0, 0.0)
        shared_cpu = fleet.shared_cpu_s()
        gaps = await batch_gaps(client, probe)
        tokens = probe.rounds * sum(probe.batches) * width * probe.output
        shared = (fleet.shared_cpu_s() - shared_cpu) / tokens
        loaded = await first_tokens_under_load(client, probe, statistics.median(gaps[min(gaps)]))
    prompt_cpu_s, answer_cpu_s = cpu if fleet.pinned else (0.0, 0.0)
    found = fit_serving(
        first, gaps, probe, decode, alone, "router",
        handed_over=handed_over, prompt_cpu_s=prompt_cpu_s, answer_cpu_s=answer_cpu_s,
    )  # fmt: skip
    at_work = alone if calibration.beside is None else calibration.beside.step.model()
    found = with_load(loaded, probe, found, at_work, handed_over=handed_over)
    router_s = None if handed_over else await _router_seconds(fleet, probe)
    found = found.model_copy(update={"shared_token_s": shared, "router_s": router_s})
    if handed_over:
        pulls = after[1] - before[1]
        if not pulls:
            raise ServedError("no prompt was handed over: the decode instance counts no pull")
        found = found.model_copy(update={"pull_s": (after[0] - before[0]) / pulls})
    say(f"{kind}: {found.requests} requests, mean error of the constants' fit {found.error:.1%}")
    return calibration.model_copy(update={"serving": {**calibration.serving, kind: found}})


async def _cpu_of(fleet: Running, work: Awaitable[Any]) -> tuple[float, ...]:
    """CPU seconds meanwhile: of the HTTP server of each engine, then of router and client."""
    before = (*fleet.front_cpu_s(), fleet.shared_cpu_s())
    await work
    return tuple(b - a for a, b in zip(before, (*fleet.front_cpu_s(), fleet.shared_cpu_s()), strict=True))


def _request_cpu(
    used: Sequence[float], idle: Sequence[float], seconds: float, requests: int, handed_over: bool
) -> tuple[float, float]:
    """CPU seconds of a request beside the steps, where its prompt is computed and where it is answered.

    What they use without requests, measured over `_IDLE_S`, is taken off.
    """
    *fronts, shared = (max(0.0, a - b * seconds / _IDLE_S) / requests for a, b in zip(used, idle, strict=True))
    # Disaggregated, router and client stay on the cores of the engine that prefills.
    return (fronts[0] + shared, fronts[-1]) if handed_over else (sum(fronts), 0.0)


async def _pulls(fleet: Running) -> tuple[float, float]:
    """Seconds and number of pulls so far. Raises ServedError where the decode instance does not say."""
    import aiohttp

    from vllm_suite.fleet.scrape import scrape

    async with aiohttp.ClientSession() as session:
        samples = await scrape(session, fleet.answering)
    if samples is None:
        raise ServedError(f"{fleet.answering} gives no metrics")
    return samples.total(f"{_PULLS}_sum"), samples.total(f"{_PULLS}_count")


async def _router_seconds(fleet: Running, probe: Probe) -> float:
    """How much later the first token comes through the router, in the median."""
    size = probe.prompts[1]
    found = {}
    for seed, url in ((5, fleet.direct), (6, fleet.url)):
        async with Client(url, SERVED) as client:
            found[url] = (await first_tokens(client, replace(probe, prompts=(size,), seed=seed)))[size]
    return statistics.median(found[fleet.url]) - statistics.median(found[fleet.direct])


async def served(
    calibration: Calibration, options: Options, kinds: Sequence[Kind], folder: Path, say: Callable[[str], None]
) -> Calibration:
    """Start each kind of fleet with the calibrated engine, measure its constants, stop it.

    Raises:
        ServedError: a request failed.
        StartFailed, DeviceError, PortTaken: the fleet cannot be started.
    """
    for kind in kinds:
        count = options.engines if kind == "colocated" else 1
        say(f"starting the {kind} fleet")
        file = spec(
            kind, options.model, options.engine, folder, device=options.device, engines=count, threads=options.threads
        )
        async with running(file) as fleet:
            calibration = await measure_fleet(fleet, kind, calibration, width=count, say=say)
    return calibration
