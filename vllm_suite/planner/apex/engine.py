"""APEX's simulation of one scheme on a trace, by the rules of its engine (microsoft/apex_plus, 2025).

Requests are dealt out in turn to model replicas, to the micro-batches of the pipeline and to attention replicas; each
such share is simulated alone. An iteration takes one token of every running request and prompts in order of arrival;
the cache is counted in tokens, and where it is full the last of the running waits and goes on later at no cost. Times
are microseconds, as in APEX. Busy time leaves waiting for arrivals out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil

import numpy as np

from vllm_suite.planner.apex.kernels import Exchanges, Kernels
from vllm_suite.planner.apex.space import Block, Scheme
from vllm_suite.planner.apex.times import StageTimes
from vllm_suite.planner.hardware import Cluster
from vllm_suite.planner.sources.base import FloatArray

WORKSPACE = 2.0**30
MOST_TOKENS = 64 * 1024
"""Bytes of each device that hold neither weights nor cache, and the most tokens of an iteration."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: microseconds from the start, tokens of prompt and output."""

    arrival: float
    prompt: int
    output: int


@dataclass
class Share:
    """What one attention replica did: iterations as runs of equal time, and each request's first and summed time."""

    seconds: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    first: dict[int, float] = field(default_factory=dict)
    total: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)

    def iterations(self) -> FloatArray:
        """The time of every iteration, in order."""
        return np.repeat(np.array(self.seconds), self.counts)


@dataclass(frozen=True)
class Outcome:
    """What APEX prints of a scheme: milliseconds, seconds for latencies and busy time."""

    scheme: Scheme
    ttft_ms: float
    tpot_ms: float
    gap_p95_ms: float
    latency_p50_s: float
    latency_p95_s: float
    busy_s: float


def simulate(
    scheme: Scheme, block: Block, cluster: Cluster, kernels: Kernels, moves: Exchanges, requests: Sequence[Ask]
) -> Outcome | None:
    """Run a scheme; None where its weights leave no room, or a request does not fit."""
    free = cluster.device.memory_gib * 2**30 - WORKSPACE - scheme.weight_bytes(block)
    per_token = 2 * block.heads_on(scheme.attention[1])[1] * block.head * block.cache_bytes
    capacity = int(free // (per_token * (block.layers // scheme.stages))) // scheme.stages if free >= 0 else 0
    if capacity < 1:
        return None
    times = StageTimes(block, scheme, kernels, moves, min(cluster.device.node.gpus, cluster.gpus), cluster.gpus)
    kept: dict[tuple[int, int], tuple[float, float, int]] = {}
    busy = []
    for replica in range(scheme.replicas):
        stages = []
        for stage in range(scheme.stages):
            own = requests[replica :: scheme.replicas][stage :: scheme.stages]
            shares = []
            for cell in range(scheme.attention[0]):
                share = _run(own[cell :: scheme.attention[0]], scheme, times, capacity)
                if share is None:
                    return None
                shares.append(share.iterations())
                # APEX keeps one record for each number within a share and product of the three indices, so shares with
                # the same product overwrite each other.
                for number, first in share.first.items():
                    key = (number, replica * stage * cell)
                    kept[key] = (first, share.total[number], share.tokens[number])
            stages.append(_slowest(shares))
        busy.append(_pipelined(stages))
    table = np.array(list(kept.values()))
    starts, totals, tokens = table[:, 0], table[:, 1], table[:, 2]
    gaps, later = (totals - starts) / np.maximum(tokens, 1), (tokens - 1).sum()
    return Outcome(
        scheme,
        float(starts.mean()) * 1e-3,
        float((totals - starts).sum() / later) * 1e-3 if later else float("nan"),
        float(np.percentile(gaps, 95)) * 1e-3,
        float(np.percentile(totals, 50)) * 1e-6,
        float(np.percentile(totals, 95)) * 1e-6,
        max(busy) * 1e-6,
    )


def _run(requests: Sequence[Ask], scheme: Scheme, times: StageTimes, capacity: int) -> Share | None:
    """One attention replica. None where a request does not fit."""
    share, running, paused, clock, cached, admitted = Share(), list[int](), list[int](), 0.0, 0, 0
    done: dict[int, int] = {}
    cells = scheme.attention[0] / min(scheme.attention[0], scheme.feed_forward[0])
    while True:
        # One token of every running request; where the cache is full, the last of them wait.
        going, kept = list(running), list[int]()
        while going:
            number = going.pop(0)
            while cached + 1 > capacity:
                victim = going.pop() if going else number
                paused.append(victim)
                cached -= requests[victim].prompt + done[victim]
                if victim == number:
                    break
            else:
                cached += 1
                kept.append(number)
        running, decoding = kept, len(kept)
        paused.sort()
        while paused and cached + requests[paused[0]].prompt + done[paused[0]] + 1 <= capacity:
            number = paused.pop(0)
            cached += requests[number].prompt + done[number] + 1
            running.append(number)
            decoding += 1
        prompts = prompt_tokens = 0
        while not paused and admitted < len(requests):
            ask = requests[admitted]
            full = cached + ask.prompt > capacity
            wide = (decoding + prompt_tokens + ask.prompt) * cells > MOST_TOKENS
            if full or wide or ask.arrival > clock:
                break
            cached += ask.prompt
            prompts, prompt_tokens = prompts + 1, prompt_tokens + ask.prompt
            done[admitted] = 0
            running.append(admitted)
            admitted += 1
        if not running:
            if admitted == len(requests):
                return share
            if requests[admitted].arrival <= clock:
                return None
            clock = requests[admitted].arrival
            continue
        step = times.microseconds(decoding + prompt_tokens, prompts, prompt_tokens, decoding)
        count = 1
        if not prompts and not paused:
            # Equal iterations up to the first that completes a request, can admit one or fills the cache.
            count = min(requests[number].output - done[number] for number in running)
            count = max(1, min(count, 1 + (capacity - cached) // len(running)))
            if admitted < len(requests):
                count = max(1, min(count, ceil((requests[admitted].arrival - clock) / step)))
        share.seconds.append(step)
        share.counts.append(count)
        clock += count * step
        cached += (count - 1) * len(running)
        left = []
        for number in running:
            if not done[number]:
                share.first[number] = share.total[number] = step * scheme.stages
                share.total[number] += (count - 1) * step * scheme.stages
            else:
                share.total[number] += count * step * scheme.stages
            done[number] += count
            share.tokens[number] = done[number]
            if done[number] < requests[number].output:
                left.append(number)
            else:
                cached -= requests[number].prompt + done[number] - 1
        running = left


def _slowest(shares: list[FloatArray]) -> FloatArray:
    """Iteration by iteration the slowest of the replicas that still have one."""
    found = np.zeros(max(len(each) for each in shares))
    for each in shares:
        found[: len(each)] = np.maximum(found[: len(each)], each)
    return found


def _pipelined(stages: list[FloatArray]) -> float:
    """Sum over windows of as many iterations as there are stages, interleaved over them, of the longest in each."""
    order = np.argsort(np.concatenate([np.arange(len(each)) for each in stages]), kind="stable")
    woven, width = np.concatenate(stages)[order], len(stages)
    if len(woven) <= width:
        return float(woven.sum())
    windows = np.lib.stride_tricks.sliding_window_view(woven, width)[: len(woven) - width]
    return float(windows.max(axis=1).sum())
