"""Spans of a request and its stages, by OpenTelemetry, where the settings name a collector.

Each call to an instance carries the `traceparent` of the span that stands for it, so a vLLM with tracing of its own
adds its spans to the same trace. Without settings nothing here is imported but `OFF`, whose methods do nothing, and a
client's own `traceparent` passes the router unchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from vllm_suite import __version__
from vllm_suite.fleet.tracing import ENV_SERVICE, TracingSpec

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Span, Tracer

_log = logging.getLogger(__name__)
_SHUTDOWN_S = 5.0
_QUEUE = 8192  # spans; what comes while it is full is dropped by the SDK, which says so in its log
_INSTANCE = "vllm_suite.instance"


class TracingUnavailable(RuntimeError):
    """The settings ask for tracing and the packages are not there."""


def check() -> None:
    """Raises TracingUnavailable where the packages of extra `otel` are missing."""
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise TracingUnavailable(f"tracing needs OpenTelemetry: pip install 'vllm-suite[otel]' ({error})") from error


class Stage(Protocol):
    """A part of a request, from `with` to its end; an exception marks it as failed, by its kind alone."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def into(self, headers: MutableMapping[str, str]) -> None:
        """Make a call with these headers a part of the stage."""

    def event(self, name: str) -> None:
        """Something happened now."""

    def failed(self, kind: str) -> None:
        """Mark it as failed, by the kind of the failure, where no exception tells."""


class Trace(Protocol):
    """One request; `Job.trace`."""

    def stage(self, name: str, instance: str = "") -> Stage:
        """A stage, on an instance where one does it."""

    def end(self, status: int, path: str, broken: str = "") -> None:
        """The request has ended with this HTTP status; `broken` says why the answer broke off, where it did."""


class _Off:
    """No trace, and each of its stages."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def into(self, headers: MutableMapping[str, str]) -> None:
        pass

    def event(self, name: str) -> None:
        pass

    def failed(self, kind: str) -> None:
        pass

    def stage(self, name: str, instance: str = "") -> Self:
        return self

    def end(self, status: int, path: str, broken: str = "") -> None:
        pass


OFF = _Off()


class Tracing:
    """One per router. `close` sends what is left.

    Args:
        count: told `exported` or `failed` and how many spans, on the loop.

    Raises TracingUnavailable.
    """

    def __init__(self, spec: TracingSpec, count: Callable[[str, int], None]) -> None:
        check()
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        ratio = TraceIdRatioBased(spec.sample)
        # A client may join its trace to ours; whether it is recorded stays the operator's choice.
        sampler = ParentBased(root=ratio, remote_parent_sampled=ratio)
        name = os.environ.get(ENV_SERVICE) or "vllm-suite-router"
        resource = Resource.create({"service.name": name, "service.version": __version__})
        self._provider = TracerProvider(resource=resource, sampler=sampler, shutdown_on_exit=False)
        exporter = _counted(OTLPSpanExporter(endpoint=spec.endpoint), asyncio.get_running_loop(), count)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=_QUEUE))
        self._tracer = self._provider.get_tracer("vllm_suite.router", __version__)
        self._context = TraceContextTextMapPropagator()

    def begin(self, endpoint: str, rid: str, headers: Mapping[str, str]) -> Trace:
        """The trace of a request, a part of the client's where its headers name one."""
        from opentelemetry.trace import SpanKind

        # The propagator looks for lower case in what it is given.
        given = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        span = self._tracer.start_span(
            f"vllm_suite.request {endpoint}",
            context=self._context.extract(given),
            kind=SpanKind.SERVER,
            attributes={"gen_ai.request.id": rid, "gen_ai.operation.name": endpoint},
        )
        return _Request(self._tracer, self._context, span)

    async def close(self) -> None:
        """Send what is left, for at most five seconds."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def end() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop has ended before
                loop.call_soon_threadsafe(ended.set)

        # A daemon: the loop's own threads are waited for at the end, as long as a silent collector takes.
        threading.Thread(target=end, name="vllm-suite last spans", daemon=True).start()
        try:
            async with asyncio.timeout(_SHUTDOWN_S):
                await ended.wait()
        except TimeoutError:
            _log.warning("the last spans could not be sent in %g s", _SHUTDOWN_S)


class _Request:
    def __init__(self, tracer: Tracer, context: Any, span: Span) -> None:
        self._tracer = tracer
        self._context = context
        self._span = span

    def stage(self, name: str, instance: str = "") -> Stage:
        from opentelemetry.trace import SpanKind, set_span_in_context

        span = self._tracer.start_span(
            name,
            context=set_span_in_context(self._span),
            kind=SpanKind.CLIENT if instance else SpanKind.INTERNAL,
            attributes={_INSTANCE: instance} if instance else None,
        )
        return _Stage(span, self._context)

    def end(self, status: int, path: str, broken: str = "") -> None:
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("http.response.status_code", status)
        self._span.set_attribute("vllm_suite.path", path)
        if status >= 500 or broken:
            self._span.set_status(StatusCode.ERROR, broken or None)
        self._span.end()


class _Stage:
    def __init__(self, span: Span, context: Any) -> None:
        self._span = span
        self._context = context

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            # Neither text nor stack: they may hold a part of a prompt or an address.
            known = getattr(error, "kind", None) or getattr(error, "stage", None)
            self.failed(str(known or type(error).__name__))
        self._span.end()

    def failed(self, kind: str) -> None:
        from opentelemetry.trace import StatusCode

        self._span.set_status(StatusCode.ERROR, kind)

    def into(self, headers: MutableMapping[str, str]) -> None:
        from opentelemetry.trace import set_span_in_context

        self._context.inject(headers, context=set_span_in_context(self._span))

    def event(self, name: str) -> None:
        self._span.add_event(name)


def _counted(
    exporter: SpanExporter, loop: asyncio.AbstractEventLoop, count: Callable[[str, int], None]
) -> SpanExporter:
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Counted(SpanExporter):
        """Says on the loop what became of spans; the SDK calls it from a thread of its own."""

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            result = SpanExportResult.FAILURE
            try:
                result = exporter.export(spans)
            finally:
                outcome = "exported" if result is SpanExportResult.SUCCESS else "failed"
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(count, outcome, len(spans))
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

        def force_flush(self, timeout_millis: int = 30_000) -> bool:
            return exporter.force_flush(timeout_millis)

    return Counted()
