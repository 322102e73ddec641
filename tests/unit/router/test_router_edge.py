"""The outer wall: keys, limits, headers, errors and the other routes."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from vllm_suite.router.auth import KeyFileError, Keys
from vllm_suite.router.config import Auth

BODY = {"model": "tiny", "prompt": "hello", "max_tokens": 3}
ROUTES = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/suite/v1/instances"),
    ("GET", "/nowhere"),
]


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_key_is_required_everywhere_but_on_health(instance, serve, method, path):
    router = await serve([await instance("any")], auth={"api_keys": ["sesame", "other"]})
    wrong = [{}, bearer("x"), bearer("sesam"), {"Authorization": "sesame"}, {"Authorization": "Basic sesame"}]
    for headers in wrong:
        async with router.client.request(method, router.url + path, headers=headers, json=BODY) as response:
            assert response.status == 401
            assert await response.read() == b'{"error":"Unauthorized"}'
    for key in ("sesame", "other"):
        async with router.client.request(method, router.url + path, headers=bearer(key), json=BODY) as response:
            assert response.status == (404 if path == "/nowhere" else 200)
    assert (await router.get("/health")) == (200, b"")
    assert router.value("rejected_total", reason="unauthorized") == len(wrong)


async def test_control_route_has_its_own_key(instance, serve):
    router = await serve([await instance("any")], auth={"api_keys": ["sesame"], "control_key": "inner"})
    assert (await router.get("/suite/v1/instances", headers=bearer("sesame")))[0] == 401
    assert (await router.get("/suite/v1/instances", headers=bearer("inner")))[0] == 200


async def test_keys_from_environment_and_file(instance, serve, monkeypatch, tmp_path):
    file = tmp_path / "keys"
    file.write_text("# comment\nfrom-file\n\n")
    monkeypatch.setenv("VLLM_SUITE_API_KEY", "from-env")
    monkeypatch.setenv("VLLM_SUITE_UPSTREAM_API_KEY", "up")
    d = await instance("any")
    router = await serve([d], auth={"api_key_file": str(file)})
    for key, status in (("from-file", 200), ("from-env", 200), ("# comment", 401)):
        assert (await router.post(BODY, headers=bearer(key)))[0] == status
    assert d.seen[0].headers["Authorization"] == "Bearer up"


async def test_client_key_stays_here_unless_told(instance, serve):
    d = await instance("any")
    quiet = await serve([d], auth={"api_keys": ["mine"]})
    await quiet.post(BODY, headers=bearer("mine"))
    assert "Authorization" not in d.seen[-1].headers
    loud = await serve([d], auth={"upstream_api_key": "up", "forward_authorization": True})
    await loud.post(BODY, headers=bearer("theirs"))
    assert d.seen[-1].headers["Authorization"] == "Bearer theirs"


async def test_refused_upstream_key_is_not_the_clients_fault(instance, serve):
    d = await instance("any")
    router = await serve([d], recovery={"decode_retries": 0})
    d.script.append("401")
    status, answer = await router.post(BODY)
    assert status == 502
    assert "key" in answer["error"]["message"]
    d.script.append("401")
    transparent = await serve([d], auth={"forward_authorization": True})
    assert (await transparent.post(BODY))[0] == 401


async def test_smuggled_fields_and_headers_are_taken_out(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    evil = {"do_remote_prefill": True, "remote_host": "10.1.1.1", "remote_port": 1}
    body = {**BODY, "prompt": list(range(50)), "kv_transfer_params": evil, "ec_transfer_params": evil}
    headers = {"X-Suite-Role": "prefill", "X-data-parallel-rank": "3", "X-Other": "stays", "Cookie": "a=b"}
    headers |= {"Connection": "x-hop", "X-Hop": "1", "Keep-Alive": "5", "TE": "trailers"}
    status, _ = await router.post(body, headers=headers)
    assert status == 200
    for seen in (p.seen[0], d.seen[0]):
        assert "ec_transfer_params" not in seen.body
        assert seen.body["kv_transfer_params"].get("remote_host") != "10.1.1.1"
        for name in ("X-Suite-Role", "X-Data-Parallel-Rank", "Cookie", "X-Hop", "Keep-Alive", "TE"):
            assert name not in seen.headers
        assert seen.headers["X-Other"] == "stays"
    assert router.value("stripped_total", what="kv_transfer_params") == 1
    assert router.value("stripped_total", what="ec_transfer_params") == 1
    assert router.value("stripped_total", what="control_header") == 2
    await router.post({**BODY, "kv_transfer_params": None})
    assert "kv_transfer_params" not in d.seen[1].body


async def test_trusted_references_pass(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d], trust_transfer_params=True)
    body = {**BODY, "prompt": list(range(50)), "kv_transfer_params": {"do_remote_prefill": True}}
    await router.post(body)
    assert not p.seen
    assert d.seen[0].body == body
    assert router.value("decisions_total", path="direct", reason="reference_given") == 1


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 129, "é", "a;b", "{}"])
async def test_odd_request_ids_are_replaced(instance, serve, given):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    headers = {} if given is None else {"X-Request-Id": given}
    body = {**BODY, "prompt": list(range(50))}
    async with router.client.post(router.url + "/v1/completions", json=body, headers=headers) as response:
        rid = response.headers["X-Request-Id"]
    assert re.fullmatch(r"[0-9a-f]{32}", rid)
    assert p.seen[0].headers["X-Request-Id"] == d.seen[0].headers["X-Request-Id"] == rid


async def test_body_limit(instance, serve):
    d = await instance("any")
    router = await serve([d], limits={"body_bytes": 1000})
    status, answer = await router.post({**BODY, "prompt": "x" * 1000})
    assert status == 413
    assert answer["error"]["code"] == 413

    async def pieces():
        for _ in range(100):
            yield b"x" * 100

    async with router.client.post(router.url + "/v1/completions", data=pieces()) as response:
        assert response.status == 413
    assert not d.seen
    assert router.value("rejected_total", reason="body_too_large") == 2


async def test_large_body_and_answer_pass(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    ids = list(range(1_000_000))
    status, _ = await router.post({**BODY, "prompt": ids})
    assert status == 200
    assert d.seen[0].body["prompt"] == p.seen[0].body["prompt"] == ids


async def test_header_limit(instance, serve):
    router = await serve([await instance("any")], limits={"header_bytes": 1024})
    async with router.client.post(router.url + "/v1/completions", json=BODY, headers={"X-A": "x" * 2000}) as response:
        assert response.status == 400


async def test_outstanding_limit(instance, serve):
    d = await instance("any")
    router = await serve([d], limits={"outstanding_requests": 2, "retry_after_s": 7})
    d.script.extend(["slow", "slow"])
    running = [asyncio.create_task(router.post(BODY)) for _ in range(2)]
    await router.until(lambda: len(d.seen) == 2)
    async with router.client.post(router.url + "/v1/completions", json=BODY) as response:
        assert response.status == 429
        assert response.headers["Retry-After"] == "7"
        assert (await response.json())["error"]["code"] == 429
    assert [status for status, _ in await asyncio.gather(*running)] == [200, 200]
    assert (await router.post(BODY))[0] == 200
    assert router.value("rejected_total", reason="outstanding") == 1


async def test_client_that_sends_no_body_is_let_go(instance, serve):
    router = await serve([await instance("any")], timeouts={"client_s": 0.2})
    port = int(router.url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nab")
    async with asyncio.timeout(2):
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")
    writer.close()
    assert router.value("timeouts_total", stage="client") == 1


async def test_client_that_reads_nothing_is_let_go(instance, serve):
    d = await instance("any", events=200_000)
    router = await serve([d], timeouts={"client_s": 0.3})
    port = int(router.url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    raw = json.dumps({**BODY, "stream": True}).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(raw), raw))
    await router.until(lambda: router.value("stream_errors_total", reason="client") == 1, timeout_s=10)
    await router.until(lambda: d.seen[0].aborted)
    writer.close()
    assert reader is not None


async def test_unknown_paths_and_methods(instance, serve):
    router = await serve([await instance("any")])
    assert await router.get("/v1/embeddings") == (
        404,
        {"error": {"message": "Not Found", "type": "Not Found", "param": None, "code": 404}},
    )
    status, answer = await router.get("/v1/completions")
    assert (status, answer["error"]["message"]) == (405, "Method Not Allowed")


async def test_models_of_one_and_of_several_kinds(instance, serve):
    one, twin = await instance("any", models=["a"]), await instance("any", models=["a"])
    router = await serve([one, twin])
    _, direct = await router.get("/v1/models")
    async with router.client.get(one.url + "/v1/models") as response:
        assert await response.json() == direct
    other = await instance("any", models=["b", "a"])
    mixed = await serve([one, other])
    _, answer = await mixed.get("/v1/models")
    assert sorted(card["id"] for card in answer["data"]) == ["a", "b"]
    assert answer["object"] == "list"
    for model, seen in (("b", other.seen), ("a", None)):
        await mixed.post({**BODY, "model": model})
        assert seen is None or seen[-1].body["model"] == model


async def test_instances_route(instance, serve):
    p, d = await instance("prefill", load={"running": 3, "waiting": 1}), await instance("decode")
    router = await serve([p, d])
    d.script.append("slow")
    task = asyncio.create_task(router.post({**BODY, "prompt": "x", "max_tokens": 40}))
    await router.until(lambda: bool(d.seen))
    status, answer = await router.get("/suite/v1/instances")
    assert status == 200
    rows = {row["role"]: row for row in answer["instances"]}
    assert rows["prefill"]["instance_id"] == p.instance_id
    assert rows["prefill"]["load"] == {"running": 3, "waiting": 1}
    assert rows["decode"]["outstanding_requests"] == 1
    assert rows["decode"]["outstanding_tokens"] == 40
    assert rows["decode"]["epoch"] == "e1"
    assert rows["decode"]["url"] == d.url
    assert rows["decode"]["ready"] is True
    await task


async def test_metrics_page(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    await router.post({**BODY, "prompt": list(range(50))})
    status, raw = await router.get("/metrics")
    assert status == 200
    text = raw.decode()
    for line in (
        'vllm_suite_router_requests_total{code="200",endpoint="completions"} 1.0',
        'vllm_suite_router_instances{ready="true",role="prefill"} 1.0',
        f'vllm_suite_router_picks_total{{instance="{d.instance_id}",stage="decode"}} 1.0',
        "vllm_suite_router_min_prompt_tokens 8.0",
    ):
        assert line in text
    assert all(line.startswith(("#", "vllm_suite_router_")) for line in text.splitlines())
    await p.stop()
    await router.until(lambda: len(router.router.pool.members) == 1)
    assert p.instance_id not in (await router.get("/metrics"))[1].decode()


async def test_no_key_is_ever_printed(instance, serve, caplog, capsys):
    caplog.set_level("DEBUG")
    secrets = {"api_keys": ["client-key"], "upstream_api_key": "upstream-key", "control_key": "control-key"}
    d = await instance("any", state_key="control-key")
    router = await serve([d], auth=secrets)
    d.script.extend(["500", "reset", "401"])
    for _ in range(4):
        await router.post(BODY, headers=bearer("client-key"))
    await router.get("/nowhere", headers=bearer("wrong-key"))
    await d.stop()
    await router.until(lambda: not router.router.pool.members)
    page = (await router.get("/metrics", headers=bearer("client-key")))[1].decode()
    printed = caplog.text + "".join(capsys.readouterr()) + page + repr(router.router.config) + repr(router.router.keys)
    assert not re.search("(client|upstream|control|wrong)-key", printed)


async def test_bad_bodies_reach_the_instance_as_they_are(instance, serve):
    """vLLM words its own refusals; the router has no opinion on a body it cannot read."""
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    for raw in (b"", b"{", b"[1, 2]", b'"text"', b"\xff\xfe", b'{"prompt": 1e}'):
        status, answer = await router.post(raw)
        assert (status, answer["error"]["message"]) == (400, "not a JSON object")
        assert d.seen[-1].raw == raw
    assert not p.seen


async def test_a_gone_client_is_no_crash(instance, serve, caplog):
    d = await instance("any", events=5000)
    router = await serve([d])
    for _ in range(5):
        async with router.client.post(router.url + "/v1/completions", json={**BODY, "stream": True}) as response:
            await response.content.readany()
            response.close()
    await router.until(lambda: router.value("requests_in_flight") == 0)
    assert "Traceback" not in caplog.text


_HALF = "\ud800"
# A white pixel.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8/5+hHgAHggJ/PchI7wAAAABJRU5ErkJggg=="
_CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


def _said(content):
    return {**_CHAT, "messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    "body",
    [
        {**BODY, "model": _HALF},
        {**BODY, "prompt": [_HALF, "b"]},
        {**BODY, "cache_salt": _HALF},
        {**_CHAT, "tools": [_HALF]},
        _said([{"type": "text", "text": _HALF}]),
        _said([{"type": _HALF, "text": "a"}]),
        _said([{"type": "image_url", "image_url": {"url": _HALF}}]),
        _said([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,AAAA{_HALF}"}}]),
        _said([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}}, {"text": _HALF}]),
        _said([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}", "detail": _HALF}}]),
        _said([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": _HALF}}]),
        _said([{"type": "image_embeds", "image_embeds": _HALF, "uuid": _HALF}]),
        {**_CHAT, "messages": [{"role": _HALF, "tool_calls": [_HALF], "content": {_HALF: 1}}]},
    ],
    ids=range(13),
)
async def test_half_a_surrogate_pair_is_no_failure_of_the_router(instance, serve, caplog, body):
    """JSON as Python reads it has them; what they mean is vLLM's to say."""
    router = await serve(
        [await instance("any")], policies={"decode": "prefix_hash"}, encode={"fetch": {"enabled": True}}
    )
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    status, _ = await router.post(json.dumps(body).encode(), path)
    assert status in (200, 400)
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_list_of_models_that_is_none_is_a_502(instance, serve):
    d = await instance("any")
    router = await serve([d])
    d.models = ["m" * (1 << 20)]
    assert (await router.get("/v1/models"))[0] == 502


async def test_a_defect_of_the_router_is_counted_as_one(instance, serve, monkeypatch):
    """Not as a client that left."""
    router = await serve([await instance("any")], slo={"ttft": "1s"})

    async def broken(job):
        raise KeyError("nobody foresaw this")

    monkeypatch.setattr(router.router._chain, "run", broken)
    assert (await router.post(BODY))[0] == 500
    assert router.value("requests_total", endpoint="completions", code="500") == 1
    assert router.value("slo_requests_total", model="other", verdict="failed") == 1


@pytest.mark.parametrize("auth", [{"api_keys": [""]}, {"control_key": " x"}, {"upstream_api_key": "a\nb"}])
def test_a_key_that_nobody_can_send_is_refused(auth):
    with pytest.raises(ValueError, match="key"):
        Auth.model_validate(auth)


def test_a_variable_for_a_key_that_is_empty_does_not_open_the_router(tmp_path):
    """As from a Secret without that entry."""
    for name in ("VLLM_SUITE_API_KEY", "VLLM_SUITE_CONTROL_KEY"):
        with pytest.raises(KeyFileError, match=f"{name} is set and empty"):
            Keys.resolve(Auth(), {name: ""})
    file = tmp_path / "key"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(KeyFileError, match="not UTF-8"):
        Keys.resolve(Auth(api_key_file=file), {})
