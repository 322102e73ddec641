"""Spans of a request: one trace over the router and what it asks of instances, by a real OTLP collector."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

import pytest
import yaml
from otlp_collector import Collector, collecting

from vllm_suite.fleet.launch import plan_instances
from vllm_suite.fleet.launch_front import plan_router, router_config
from vllm_suite.fleet.spec import FleetSpec
from vllm_suite.fleet.tracing import TracingSpec
from vllm_suite.router import tracing as tracing_module
from vllm_suite.router.config import RouterConfig

LONG = {"model": "tiny", "prompt": list(range(100)), "max_tokens": 5, "stream": True}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"


async def flush(router) -> None:
    """Send what the router's SDK has gathered; it would by itself some seconds later."""
    assert await asyncio.to_thread(router.router._tracing._provider.force_flush, 10_000)


def tracing(collector: Collector, **over) -> dict:
    return {"endpoint": collector.url, **over}


async def test_stages_and_calls_are_one_trace(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    async with collecting() as collector:
        router = await serve([p, d], tracing=tracing(collector))
        status, _ = await router.post(LONG, headers={"X-Request-Id": "mine"})
        assert status == 200
        await flush(router)
        by = {span.name: span for span in collector.spans}
        assert set(by) == {"vllm_suite.request completions", "prefill", "decode"}
        root = by["vllm_suite.request completions"]
        assert {span.trace for span in collector.spans} == {root.trace}
        assert (root.parent, root.kind, root.service) == ("", 2, "vllm-suite-router")
        assert root.attributes["gen_ai.request.id"] == "mine"
        assert root.attributes["http.response.status_code"] == 200
        assert root.attributes["vllm_suite.path"] == "disaggregated"
        for name, one in (("prefill", p), ("decode", d)):
            assert by[name].parent == root.span
            assert by[name].attributes["vllm_suite.instance"] == one.instance_id
            said, flags = one.seen[-1].headers["traceparent"].rsplit("-", 1)
            assert said == f"00-{root.trace}-{by[name].span}"
            assert int(flags, 16) & 1 == 1
        assert by["decode"].events == ("first_byte",)
        await router.until(lambda: router.value("trace_spans_total", outcome="exported") == 3)


async def test_a_clients_trace_is_joined(instance, serve):
    d = await instance("any")
    async with collecting() as collector:
        router = await serve([d], tracing=tracing(collector))
        await router.post(LONG, headers={"traceparent": SAMPLED, "tracestate": "a=b"})
        await flush(router)
        root = next(span for span in collector.spans if span.name.startswith("vllm_suite.request"))
        assert (root.trace, root.parent) == (TRACE, PARENT)
        assert d.seen[-1].headers.getall("traceparent")[0].startswith(f"00-{TRACE}-")
        assert PARENT not in d.seen[-1].headers["traceparent"]
        assert d.seen[-1].headers["tracestate"] == "a=b"
        collector.spans.clear()
        await router.post(LONG, headers={"traceparent": UNSAMPLED})
        await flush(router)
        assert collector.spans == []
        assert d.seen[-1].headers["traceparent"].endswith("-00")


async def test_the_operator_decides_how_many(instance, serve):
    d = await instance("any")
    async with collecting() as collector:
        router = await serve([d], tracing=tracing(collector, sample=0.0))
        await router.post(LONG, headers={"traceparent": SAMPLED})
        await flush(router)
        assert collector.spans == []
        # What the instance is told: do not record either.
        assert d.seen[-1].headers["traceparent"].endswith("-00")


async def test_failed_attempts_are_spans_without_words(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    p.script, d.script = deque(["500"]), deque(["503", "503"])
    async with collecting() as collector:
        router = await serve([p, d], tracing=tracing(collector), recovery={"decode_retries": 0})
        status, _ = await router.post(LONG)
        assert status == 503
        await flush(router)
        failed = {span.name for span in collector.spans if span.failed}
        assert failed == {"prefill", "decode", "vllm_suite.request completions"}
        assert {span.said for span in collector.spans if span.failed} == {"status", ""}
        assert not any("127.0.0.1" in str(span) for span in collector.spans)


@pytest.mark.parametrize(("word", "reason"), [("die", "disconnect"), ("stall", "idle"), ("dead_late", "engine_dead")])
async def test_a_stream_that_breaks_off_is_a_failed_span(instance, serve, word, reason):
    d = await instance("any")
    d.script.append(word)
    async with collecting() as collector:
        router = await serve([d], tracing=tracing(collector), timeouts={"idle_s": 0.3})
        status, _ = await router.post(LONG)
        assert status == 200
        await flush(router)
        assert {(span.name, span.failed, span.said) for span in collector.spans} == {
            ("vllm_suite.request completions", True, reason),
            ("decode", True, reason),
        }
        collector.spans.clear()
        await router.post(LONG)
        await flush(router)
        assert len(collector.spans) == 2
        assert not any(span.failed for span in collector.spans)


async def test_a_collector_that_is_away_costs_spans_only(instance, serve):
    d = await instance("any")
    async with collecting() as collector:
        collector.status = 400
        router = await serve([d], tracing=tracing(collector))
        status, _ = await router.post(LONG)
        assert status == 200
        await flush(router)
        await router.until(lambda: router.value("trace_spans_total", outcome="failed") == 2)


async def test_a_silent_collector_does_not_hold_the_router_up(monkeypatch):
    """What waits for it is a daemon: the process may end."""
    monkeypatch.setattr(tracing_module, "_SHUTDOWN_S", 0.1)
    before = set(threading.enumerate())
    with socket.create_server(("127.0.0.1", 0)) as silent:
        spec = TracingSpec(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces")
        one = tracing_module.Tracing(spec, lambda outcome, spans: None)
        one.begin("chat", "r", {}).end(200, "direct")
        await one.close()
    assert [thread for thread in set(threading.enumerate()) - before if not thread.daemon] == []


async def test_without_settings_nothing_is_added(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    await router.post(LONG)
    assert not any("traceparent" in seen.headers for one in (p, d) for seen in one.seen)
    await router.post({**LONG, "prompt": list(range(500, 600))}, headers={"traceparent": SAMPLED})
    assert {one.seen[-1].headers["traceparent"] for one in (p, d)} == {SAMPLED}


def test_without_settings_nothing_is_imported() -> None:
    code = "import sys, vllm_suite.router.app; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_missing_packages_are_named(tmp_path: Path) -> None:
    path = tmp_path / "router.yaml"
    settings = {
        "membership": {"static": [{"url": "http://127.0.0.1:9"}]},
        "tracing": {"endpoint": "http://c:4318/v1/traces"},
    }
    path.write_text(yaml.safe_dump(settings))
    code = (
        "import sys; sys.modules['opentelemetry.sdk.trace'] = None\n"
        f"from vllm_suite.cli.main import main; sys.exit(main(['router', '--config', {str(path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == 2
    assert "vllm-suite[otel]" in done.stderr


def test_one_key_of_the_file_is_for_all_of_them() -> None:
    data = {"model": "m", "name": "llm", "pools": {"prefill": {}, "decode": {}}, "local": {"device": "cpu"}}
    endpoint = "http://collector:4318/v1/traces"
    spec = FleetSpec.model_validate({**data, "tracing": {"endpoint": endpoint, "sample": 0.5}})
    launches = plan_instances(spec)
    for launch in launches:
        assert launch.argv[launch.argv.index("--otlp-traces-endpoint") + 1] == endpoint
        assert launch.env["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf"
        assert launch.env["OTEL_SERVICE_NAME"] == f"llm-{launch.role}"
        assert launch.env["OTEL_RESOURCE_ATTRIBUTES"] == f"service.namespace=llm,service.instance.id={launch.name}"
    assert plan_router(spec, launches).env["OTEL_SERVICE_NAME"] == "llm-router"
    config = RouterConfig.model_validate(yaml.safe_load(router_config(spec, launches)))
    assert config.tracing == spec.tracing
    plain = plan_instances(FleetSpec.model_validate(data))
    assert not any("OTEL" in str(launch.env) or "--otlp-traces-endpoint" in launch.argv for launch in plain)


@pytest.mark.parametrize("endpoint", ["collector:4318", "http://collector:4318", "grpc://c:4317/x", "http://u:p@c/x"])
def test_an_endpoint_is_a_whole_address(endpoint: str) -> None:
    with pytest.raises(ValueError, match="OTLP"):
        RouterConfig.model_validate({"tracing": {"endpoint": endpoint}})
