"""Which encoder gets which items: a request's items side by side, by predicted cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vllm_suite.router.encode.config import Encode
from vllm_suite.router.encode.parts import Item
from vllm_suite.router.members import Member, hash64
from vllm_suite.router.policies import mix


class Spread(Protocol):
    """A policy. Called on the event loop: it must not block."""

    def order(self, items: Sequence[Item], members: Sequence[Member]) -> list[list[Member]]:
        """For each item the members in the order in which they are to be tried; `members` is never empty."""
        ...


class LeastEncodeTokens:
    """The longest item first, each to whoever has the least to do then; that balances within a third of the best."""

    def __init__(self, settings: Encode) -> None:
        self._turn = 0

    def order(self, items: Sequence[Item], members: Sequence[Member]) -> list[list[Member]]:
        self._turn += 1
        count = len(members)
        load = [member.encode_tokens for member in members]
        result: list[list[Member]] = [[] for _ in items]
        for number in _longest_first(items):
            ranked = sorted(range(count), key=lambda index: (load[index], (index - self._turn) % count))
            load[ranked[0]] += items[number].tokens
            result[number] = [members[index] for index in ranked]
        return result


class CacheAffinity:
    """Rendezvous hashing on an item's identity, with bounded load.

    The same image goes to the same encoder, whose pool may still hold it, whatever router asks and whoever comes or
    goes. An encoder that would hold more than `load_factor` times the mean, this request's items included, is passed
    over for the next in the item's own order; an idle one takes any item.
    """

    def __init__(self, settings: Encode) -> None:
        self._factor = settings.load_factor

    def order(self, items: Sequence[Item], members: Sequence[Member]) -> list[list[Member]]:
        load = [member.encode_tokens for member in members]
        bound = self._factor * (sum(load) + sum(item.tokens for item in items)) / len(members)
        result: list[list[Member]] = [[] for _ in items]
        for number in _longest_first(items):
            item = items[number]
            content = hash64(item.identity.encode())
            ranked = sorted(range(len(members)), key=lambda index: mix(content ^ members[index].key), reverse=True)
            fits = [index for index in ranked if load[index] + item.tokens <= max(bound, item.tokens)]
            first = fits[0] if fits else min(ranked, key=load.__getitem__)
            load[first] += item.tokens
            result[number] = [members[first], *(members[index] for index in ranked if index != first)]
        return result


def _longest_first(items: Sequence[Item]) -> list[int]:
    return sorted(range(len(items)), key=lambda number: -items[number].tokens)


def make_spread(settings: Encode) -> Spread:
    """The policy that the settings name."""
    return CacheAffinity(settings) if settings.policy == "cache_affinity" else LeastEncodeTokens(settings)
