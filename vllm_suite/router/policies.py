"""Which instance a stage gets. A policy sees an immutable snapshot and answers with an index.

The pool leaves out whatever is unready, excluded or of another model before a policy is asked, so a policy
weighs load and locality only. A new one is a class here and a line in `POLICIES`.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from math import ceil
from typing import NamedTuple, Protocol

from vllm_suite.router.config import Policies


class Candidate(NamedTuple):
    """One ready instance at the moment of the choice."""

    instance_id: str
    epoch: str
    key: int  # 64-bit hash of the instance id
    outstanding_requests: int
    outstanding_tokens: int
    waiting: int  # requests queued inside the instance when it was last asked


class Demand(NamedTuple):
    """What is known about the request."""

    prompt_tokens: int
    prefix_key: int | None  # 64-bit hash of the prompt's start; None where no policy asked for it


class Policy(Protocol):
    """Called once per attempt of a stage, on the event loop: it must not block."""

    def choose(self, candidates: Sequence[Candidate], demand: Demand) -> int:
        """Index of the chosen candidate; `candidates` is never empty and is sorted by instance id."""
        ...


class RoundRobin:
    """The instance after the last one in order of id, whoever came or went meanwhile."""

    def __init__(self, settings: Policies) -> None:
        self._last = ""

    def choose(self, candidates: Sequence[Candidate], demand: Demand) -> int:
        index = bisect_right([candidate.instance_id for candidate in candidates], self._last)
        index %= len(candidates)
        self._last = candidates[index].instance_id
        return index


class LeastTokens:
    """Fewest outstanding tokens; equal ones take turns."""

    def __init__(self, settings: Policies) -> None:
        self._turn = 0

    def choose(self, candidates: Sequence[Candidate], demand: Demand) -> int:
        count = len(candidates)
        if count == 1:
            return 0
        self._turn += 1
        return min(
            range(count),
            key=lambda index: (_load(candidates[index]), (index - self._turn) % count),
        )


class PowerOfTwo:
    """The less loaded of two drawn instances."""

    def __init__(self, settings: Policies) -> None:
        self._random = random.Random(settings.seed)

    def choose(self, candidates: Sequence[Candidate], demand: Demand) -> int:
        if len(candidates) == 1:
            return 0
        first, second = self._random.sample(range(len(candidates)), 2)
        return first if _load(candidates[first]) <= _load(candidates[second]) else second


class PrefixHash:
    """Rendezvous hashing on the prompt's start, with bounded load.

    A prompt keeps its instance when others come or go. An instance that would hold more than `load_factor`
    times the mean number of requests is passed over for the next in the prompt's own order.
    """

    def __init__(self, settings: Policies) -> None:
        self._factor = settings.load_factor
        self._spread = LeastTokens(settings)

    def choose(self, candidates: Sequence[Candidate], demand: Demand) -> int:
        prefix = demand.prefix_key
        if prefix is None:
            return self._spread.choose(candidates, demand)
        total = sum(candidate.outstanding_requests for candidate in candidates) + 1
        bound = ceil(self._factor * total / len(candidates))
        scores = [mix(prefix ^ candidate.key) for candidate in candidates]
        order = sorted(range(len(candidates)), key=scores.__getitem__, reverse=True)
        for index in order:
            if candidates[index].outstanding_requests < bound:
                return index
        raise AssertionError("the bound leaves at least one instance below it")


def _load(candidate: Candidate) -> tuple[int, int, int]:
    return candidate.outstanding_tokens, candidate.outstanding_requests, candidate.waiting


def mix(value: int) -> int:
    """splitmix64's finaliser: neighbouring inputs give unrelated 64-bit outputs."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


POLICIES: dict[str, Callable[[Policies], Policy]] = {
    "round_robin": RoundRobin,
    "least_tokens": LeastTokens,
    "power_of_two": PowerOfTwo,
    "prefix_hash": PrefixHash,
}


def make_policy(name: str, settings: Policies) -> Policy:
    """A fresh policy; each stage has its own. Raises KeyError for an unknown name."""
    return POLICIES[name](settings)
