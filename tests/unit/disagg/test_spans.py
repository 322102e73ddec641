"""Spans of pulls: in the trace of the request, for traced requests only, and nothing imported without one."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("opentelemetry.sdk.trace")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from vllm_disagg.spans import PullSpans

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
MS = 1_000_000


class Clock:
    now = 1_700_000_000_000 * MS

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def seen() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(seen: InMemorySpanExporter) -> TracerProvider:
    made = TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(seen))
    return made


def test_a_pull_is_a_span_of_its_request(provider: TracerProvider, seen: InMemorySpanExporter) -> None:
    clock = Clock()
    spans = PullSpans(provider, clock)
    spans.begun("a", {"traceparent": f"00-{TRACE}-{PARENT}-01"})
    spans.begun("b", {"traceparent": f"00-{TRACE}-{PARENT}-01"})
    clock.now += 3 * MS
    spans.ended("a", "prefill-0", 4096, "")
    spans.ended("a", "prefill-0", 4096, "")
    clock.now += 2 * MS
    spans.ended("b", "", 0, "deadline")
    good, bad = seen.get_finished_spans()
    assert {one.name for one in (good, bad)} == {"transfer"}
    for one in (good, bad):
        assert one.parent is not None
        assert (f"{one.context.trace_id:032x}", f"{one.parent.span_id:016x}") == (TRACE, PARENT)
        assert one.kind is SpanKind.CLIENT
    assert good.start_time is not None
    assert good.end_time is not None
    assert good.end_time - good.start_time == 3 * MS
    assert dict(good.attributes or {}) == {"vllm_suite.instance": "prefill-0", "vllm_suite.bytes": 4096}
    assert good.status.status_code is StatusCode.UNSET
    assert (bad.status.status_code, bad.status.description) == (StatusCode.ERROR, "deadline")
    assert not len(spans)


def test_what_is_not_traced_leaves_nothing(provider: TracerProvider, seen: InMemorySpanExporter) -> None:
    spans = PullSpans(provider)
    spans.begun("a", None)
    spans.begun("b", {})
    assert not len(spans)
    spans.ended("a", "prefill-0", 1, "")
    # The router's sampling holds: its flag says not to record.
    spans.begun("c", {"traceparent": f"00-{TRACE}-{PARENT}-00"})
    spans.ended("c", "prefill-0", 1, "")
    assert not seen.get_finished_spans()


def test_nothing_is_imported_for_requests_without_a_trace() -> None:
    code = (
        "import sys; from vllm_disagg.spans import PullSpans; spans = PullSpans(); spans.begun('a', None); "
        "spans.ended('a', 'p', 1, ''); sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
