"""Values of an API server's own series, read cheaply."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class OwnSeries(Generic[T]):
    """Some series, collected from the registry that vLLM exports.

    With several API servers the values lie in files of all processes, and reading them takes milliseconds: then it is
    done in a thread and not more often than asked for.

    Args:
        names: of the series.
        collect: their values, from a registry.
        every: seconds between two looks into the files.
    """

    def __init__(self, names: tuple[str, ...], collect: Callable[[Any], T], every: float) -> None:
        self._names, self._collect, self._every = names, collect, every
        self._shared: T | None = None
        self._shared_at = float("-inf")

    async def read(self, empty: T) -> T:
        """The values; `empty` while the first look into the files is under way for somebody else."""
        from prometheus_client import REGISTRY
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        registry = get_prometheus_registry()
        if registry is REGISTRY:
            return self._collect(REGISTRY.restricted_registry(self._names))
        now = time.monotonic()
        if now - self._shared_at >= self._every:
            self._shared_at = now
            self._shared = await asyncio.to_thread(self._collect, registry)
        return empty if self._shared is None else self._shared
