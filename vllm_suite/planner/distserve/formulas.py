"""The formulas of the DistServe paper: queueing of prefill (section 3.1), L_m, transfer of the cache, Appendix A.

Seconds, tokens and bytes. Prefill is taken as a queue with Poisson arrivals and equal prompts, one at a time (M/D/1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from vllm_suite.planner.models import Model, Parallel, Quantization
from vllm_suite.planner.models.memory import kv_bytes
from vllm_suite.planner.sources.base import LatencySource
from vllm_suite.planner.sources.steps import Steps


def ttft_single(time: float, rate: float, *, replicas: int = 1) -> float:
    """Mean TTFT of one instance (equation 1), or of several among which requests are dealt out at random.

    Args:
        time: of a prefill alone.
        rate: of all requests, per second.

    Returns:
        inf where the load is 1 or more.
    """
    return time + _wait(time, rate / replicas)


def ttft_pipeline(time: float, rate: float, *, stages: int = 2, replicas: int = 1) -> float:
    """The same with a pipeline of equal stages: a prefill takes as long, but the next one may follow earlier.

    Equation 2 is that of two stages.
    """
    return time + _wait(time / stages, rate / replicas)


def ttft_tensor(time: float, rate: float, speedup: float, *, replicas: int = 1) -> float:
    """The same with tensor parallelism, which makes a prefill faster by `speedup` (equation 3)."""
    return ttft_single(time / speedup, rate, replicas=replicas)


def _wait(service: float, rate: float) -> float:
    load = rate * service
    return rate * service**2 / (2 * (1 - load)) if load < 1 else math.inf


def crossover_rate(time: float, speedup: float, *, replicas: int = 1) -> float:
    """The rate up to which tensor parallelism of two ranks has the shorter TTFT, and above which two stages have it.

    Setting equations 2 and 3 equal, with K for the speed-up and x for rate times `time` of one replica, gives
    x² - (K + 2) x + 8 K (K - 1) / (3 K - 2) = 0, of which the smaller root lies below saturation.

    Raises:
        ValueError: the speed-up is not between 1 and 2.
    """
    if not 1 <= speedup <= 2:
        raise ValueError(f"two ranks are faster by 1 to 2, not by {speedup:g}")
    half = (speedup + 2) / 2
    root = math.sqrt(max(0.0, half**2 - 8 * speedup * (speedup - 1) / (3 * speedup - 2)))
    return (half - root) / time * replicas


def saturating_prompt(source: LatencySource, *, share: float = 0.9, most: int = 8192) -> int:
    """L_m of prefill: the shortest prompt that alone gets a share of the most tokens per second of any prompt.

    The paper reads it off measurements, as the length from which on a prefill's time grows with its length; the share
    says how close is close enough.

    Raises:
        SourceError: the source does not know prompts of up to `most` tokens.
    """
    lengths = range(1, most + 1)
    rates = [length / source.step_seconds(Steps.of([(length, 0)])) for length in lengths]
    enough = share * max(rates)
    return next(length for length, rate in zip(lengths, rates, strict=True) if rate >= enough)


def prefill_batches(prompts: Iterable[int], limit: int) -> list[list[int]]:
    """How prompts are batched: first come, first served, up to L_m tokens in all; a longer prompt goes alone."""
    batches: list[list[int]] = []
    room = 0
    for prompt in prompts:
        if prompt > room:
            batches.append([])
            room = limit
        batches[-1].append(prompt)
        room -= prompt
    return batches


def kv_bytes_per_second(model: Model, quant: Quantization, tokens: float, rate: float) -> float:
    """Bytes per second that prefill hands to decode: `rate` requests per second with prompts of `tokens` on average."""
    return rate * tokens * kv_bytes(model, quant, Parallel(), 16) / 16


def prefill_work(
    lengths: Sequence[int], *, hidden: int, ffn: int, tp: int = 1, block: int = 32
) -> tuple[float, float, float]:
    """What the three constants of Appendix A are multiplied with, of one layer: products, attention's memory, 1.

    Args:
        lengths: tokens of each prompt.
        hidden, ffn: widths of the model, before they are divided by `tp`.
        block: queries that the attention kernel takes at once.
    """
    h, m = hidden / tp, ffn / tp
    total, squares = sum(lengths), sum(length**2 for length in lengths)
    return 4 * total * h**2 + 2 * total * h * m, 3 * h * squares / block, 1.0


def decode_work(contexts: Sequence[int], *, hidden: int, ffn: int, tp: int = 1) -> tuple[float, float]:
    """The same of a decode step: weights that are read, and keys and values."""
    h, m = hidden / tp, ffn / tp
    return 4 * h**2 + 2 * h * m, 3 * h * sum(contexts)
