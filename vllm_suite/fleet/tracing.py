"""The `tracing:` section of a fleet file: where the spans of the router and of every instance go."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from vllm_suite.fleet.engine import Settings

PROTOCOL = "http/protobuf"
ENV_PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
ENV_SERVICE = "OTEL_SERVICE_NAME"
ENV_ATTRIBUTES = "OTEL_RESOURCE_ATTRIBUTES"


def _endpoint(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path in ("", "/"):
        raise ValueError(
            f"not an OTLP/HTTP address with its path, for example http://collector:4318/v1/traces: {text!r}"
        )
    if parts.username or parts.password:
        raise ValueError("a collector's credentials belong into OTEL_EXPORTER_OTLP_HEADERS, not into its address")
    return text


class TracingSpec(Settings):
    """One collector for all of them. It needs extra `otel` where the router runs; vLLM brings its own packages."""

    endpoint: Annotated[str, AfterValidator(_endpoint)] = Field(
        description="OTLP over HTTP, path included: http://collector:4318/v1/traces"
    )
    sample: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1.0, description="share of the requests that are traced; the router decides, the instances follow"
    )
