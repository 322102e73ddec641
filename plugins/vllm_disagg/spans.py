"""A span for each pull, in the trace of its request, where vLLM's own tracing is on.

vLLM gives the scheduler a request's trace headers only where it was started with ``--otlp-traces-endpoint``, and its
engine process has a tracer of its own then. Otherwise nothing is kept here, and nothing is imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

NAME = "transfer"
"""As the stage in ``vllm_suite_kv_stage_seconds``."""


class PullSpans:
    """The scheduler calls it twice a pull; not thread-safe.

    Args:
        provider: vLLM's, which is the process's own, where it is left out.
        clock: nanoseconds since 1970.
    """

    def __init__(self, provider: TracerProvider | None = None, clock: Callable[[], int] = time.time_ns) -> None:
        self._provider = provider
        self._clock = clock
        self._begun: dict[str, tuple[int, Mapping[str, str]]] = {}

    def begun(self, request_id: str, headers: Mapping[str, str] | None) -> None:
        """The pull was ordered; ``headers`` are the request's trace headers, None where it is not traced."""
        if headers:
            self._begun[request_id] = (self._clock(), headers)

    def ended(self, request_id: str, producer: str, size: int, failure: str) -> None:
        """The pull has ended, with ``size`` bytes; ``failure`` is its kind, "" where it succeeded."""
        found = self._begun.pop(request_id, None)
        if found is None:
            return
        from opentelemetry.trace import SpanKind, StatusCode, get_tracer
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        began, headers = found
        span = get_tracer("vllm_disagg", tracer_provider=self._provider).start_span(
            NAME,
            context=TraceContextTextMapPropagator().extract(headers),
            kind=SpanKind.CLIENT,
            attributes={"vllm_suite.instance": producer, "vllm_suite.bytes": size},
            start_time=began,
        )
        if failure:
            span.set_status(StatusCode.ERROR, failure)
        span.end(self._clock())

    def __len__(self) -> int:
        return len(self._begun)
