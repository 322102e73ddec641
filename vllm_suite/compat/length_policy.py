"""The seam between vLLM's scheduler (`vllm_suite.compat.length_scheduler`) and who decides its order: plugin dler."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol

End = Literal["stop", "length", "repetition", "abort", "error"]
"""How a request ended: only after ``stop`` is its length known, ``error`` says nothing."""

Eviction = Literal["kv_full", "reset"]
"""Why a running request was queued again: no block was left, or the prefix cache is being reset."""

REPORT_METHOD = "suite_scheduler_report"
"""What an engine core answers an API server that asks it what the scheduler counted."""


class LengthPolicy(Protocol):
    """Called from the engine's one thread, in the order in which things happen.

    Attributes:
        reorders: False where vLLM's own queues and victims stay; read once.
        sorts_running: whether `sort_running` is wanted before steps that may evict; read once.
        gates: whether `places` is wanted before steps that may admit.
        headroom: tokens of KV cache that an admission has to leave free, now.
    """

    reorders: bool
    sorts_running: bool
    gates: bool
    headroom: int

    def queue(self, base: type) -> Any:
        """A new queue, of a class that derives from ``base``, vLLM's `RequestQueue`."""

    def arrived(self, request: Any, cached_tokens: int) -> Any:
        """Before a request is queued; so many of its prompt tokens need not be computed here."""

    def renewed(self, request: Any) -> None:
        """A streaming session got its next input."""

    def begin_step(self) -> None:
        """Before each step; ranks stand still until the next one."""

    def sort_running(self, running: list[Any]) -> None:
        """Before a step that may evict: in place, the best victim last."""

    def places(self, running: list[Any], waiting: Any, capacity: int) -> int:
        """How many of ``waiting``, a queue of `queue`'s, may begin in this step; the KV cache holds ``capacity``
        tokens."""

    def admitted(self, request_ids: Iterable[str]) -> None:
        """Requests began to run, or do so again."""

    def evicted(self, request: Any, reason: Eviction) -> None:
        """Before a running request is queued again."""

    def finished(self, request: Any, end: End) -> None:
        """A request ended."""

    def take_stops(self) -> list[str]:
        """Requests to end now, with what they have."""

    def close(self) -> None:
        """The engine ends."""

    def report(self) -> dict[str, Any]:
        """What was counted, as plain values: strings, numbers, lists and dictionaries with string keys."""


PolicyFactory = Callable[[Any], LengthPolicy]
"""Makes a policy for a `VllmConfig`."""
