"""An OTLP/HTTP collector on loopback that keeps the spans it is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Seen:
    """One span."""

    service: str
    name: str
    trace: str
    span: str
    parent: str
    kind: int
    failed: bool
    said: str
    attributes: dict[str, Any]
    events: tuple[str, ...]


@dataclass
class Collector:
    url: str = ""
    status: int = 200
    spans: list[Seen] = field(default_factory=list)

    async def _take(self, request: web.Request) -> web.Response:
        body = ExportTraceServiceRequest.FromString(await request.read())
        if self.status != 200:
            return web.Response(status=self.status)
        for resource in body.resource_spans:
            service = values(resource.resource.attributes).get("service.name", "")
            for span in (span for scope in resource.scope_spans for span in scope.spans):
                self.spans.append(
                    Seen(
                        service=service,
                        name=span.name,
                        trace=span.trace_id.hex(),
                        span=span.span_id.hex(),
                        parent=span.parent_span_id.hex(),
                        kind=span.kind,
                        failed=span.status.code == 2,
                        said=span.status.message,
                        attributes=values(span.attributes),
                        events=tuple(event.name for event in span.events),
                    )
                )
        return web.Response(body=b"", content_type="application/x-protobuf")

    def of(self, trace: str) -> list[Seen]:
        return [span for span in self.spans if span.trace == trace]

    async def until(self, count: int, timeout_s: float = 30.0) -> None:
        async with asyncio.timeout(timeout_s):
            while len(self.spans) < count:
                await asyncio.sleep(0.02)


def values(attributes: Any) -> dict[str, Any]:
    """OTLP's key-values as a dictionary."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value") or "string_value") for one in attributes}


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    """A running collector."""
    made = Collector()
    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/v1/traces", made._take)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/traces"
    try:
        yield made
    finally:
        await runner.cleanup()
