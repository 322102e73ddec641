"""The router between clients and instances that send anything: it stays up, ends every request and says why."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from fuzz_checks import DEADLINE_S, OWN, Log, complaints, examples, says_why
from hypothesis import event, given, note
from hypothesis import strategies as st
from shapes import ANY_JSON, encoded, request, upstream
from wild import STATE, Raw, Wild, exchange

from vllm_suite.router.app import ROUTER, Router, create_app
from vllm_suite.router.config import RouterConfig


class Fuzzed:
    """A router, one prefill and one decode instance."""

    def __init__(self, router: Router, url: str, instances: tuple[Wild, Wild]) -> None:
        self.router = router
        self.url = url
        self.prefill, self.decode = instances

    async def ready(self, wanted: int = 2) -> None:
        """Both instances are members and nobody doubts them."""
        async with asyncio.timeout(DEADLINE_S):
            while sum(member.ready for member in self.router.pool.members) < wanted:
                await asyncio.sleep(0.005)

    async def at_rest(self) -> None:
        """No request is left behind, and nothing is charged for one."""
        async with asyncio.timeout(DEADLINE_S):
            while self.router.live.requests_in_flight or self.router.watchdog._guards:
                await asyncio.sleep(0.005)
        for member in self.router.pool.members:
            assert (member.outstanding_requests, member.outstanding_tokens) == (0, 0)


@pytest.fixture
async def fuzzed() -> AsyncIterator[Fuzzed]:
    instances = (await Wild("prefill").start(), await Wild("decode").start())
    config = RouterConfig.model_validate(
        {
            "membership": {
                "static": [{"url": one.url, "role": one.role} for one in instances],
                "poll_interval_s": 0.02, "poll_timeout_s": 2.0, "forget_after_s": 5.0,
            },
            "disaggregation": {"min_prompt_tokens": 4},
            "limits": {"wait_for_instance_s": 2.0, "body_bytes": 100_000},
            "timeouts": {"prefill_s": 0.3, "first_byte_s": 0.3, "idle_s": 0.3, "client_s": 0.3, "total_s": 3.0},
            "encode": {"fetch": {"enabled": False}},
        }
    )  # fmt: skip
    app = create_app(config)
    # As `server.serve` runs it.
    runner = web.AppRunner(
        app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1, max_line_size=16_384,
        max_field_size=16_384, max_headers=100,
    )  # fmt: skip
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    found = Fuzzed(app[ROUTER], f"http://{host}:{port}", instances)
    await found.ready()
    yield found
    await runner.cleanup()
    for one in instances:
        await one.stop()


async def _clients(fuzzed: Fuzzed, log: Log, sent: tuple[list[bytes], bool]) -> None:
    pieces, _ = sent
    await fuzzed.ready()
    got = await exchange(fuzzed.url, pieces, DEADLINE_S)
    note(f"{got.raw[:600]!r}")
    event(f"status {got.status}")
    assert got.ended, "the connection is stuck"
    head = b"".join(pieces)[:5] == b"HEAD "
    if got.status is None:
        # Only what never became a request goes without an answer.
        assert got.raw == b""
    elif got.status != 200:
        assert got.status in OWN
        assert head or says_why(got.body)
    await fuzzed.at_rest()
    assert not complaints(log)


async def _instances(fuzzed: Fuzzed, log: Log, prefill: list[Raw], decode: list[Raw], stream: bool, chat: bool) -> None:
    await fuzzed.ready()
    fuzzed.prefill.script.extend(prefill)
    fuzzed.decode.script.extend(decode)
    text = {"messages": [{"role": "user", "content": "word " * 20}]} if chat else {"prompt": list(range(30))}
    body = json.dumps({"model": "tiny", "max_tokens": 4, "stream": stream, **text}).encode()
    path = b"/v1/chat/completions" if chat else b"/v1/completions"
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (path, len(body))
    got = await exchange(fuzzed.url, [head + body], DEADLINE_S)
    note(f"{got.raw[:600]!r}")
    event(f"status {got.status}")
    assert got.ended, "the connection is stuck"
    # An answer has begun in any case; of one that is cut off at least the head was there.
    assert got.status is not None
    if got.status >= 400:
        # A refusal of the request itself is the instance's, as it is; everything else has words.
        assert got.body.strip() or (got.status < 500 and got.status != 429)
        assert got.status != 500 or any(b"500" in b"".join(raw.pieces) for raw in [*prefill, *decode])
    fuzzed.prefill.script.clear()
    fuzzed.decode.script.clear()
    await fuzzed.at_rest()
    assert not complaints(log)


async def _states(fuzzed: Fuzzed, log: Log, state: Any) -> None:
    fuzzed.prefill.state = state
    for _ in range(3):
        await asyncio.sleep(0.02)
        got = await exchange(fuzzed.url, [b"GET /suite/v1/instances HTTP/1.0\r\n\r\n"], DEADLINE_S)
        assert got.status == 200
        assert json.loads(got.body)["instances"] is not None
        got = await exchange(fuzzed.url, [b"GET /metrics HTTP/1.0\r\n\r\n"], DEADLINE_S)
        assert got.status == 200
    fuzzed.prefill.state = fuzzed.prefill.good
    await fuzzed.ready()
    assert not complaints(log)


_ANSWERS = st.lists(upstream(), max_size=2)
_FULL = {**STATE, "instance_id": "i", "epoch": "e", "role": "any", "role_epoch": 1, "phase": "serving", "can": ["any"]}
_FULL |= {"running": {}, "plugins": [], "ec": {}}
_STATE = st.one_of(
    st.fixed_dictionaries({}, optional={name: st.just(value) | ANY_JSON for name, value in _FULL.items()}),
    ANY_JSON,
    st.binary(max_size=20),
)


@examples(40)
@given(sent=request())
async def test_whatever_clients_send(fuzzed: Fuzzed, log: Log, sent: tuple[list[bytes], bool]) -> None:
    await _clients(fuzzed, log, sent)


@examples(40)
@given(prefill=_ANSWERS, decode=_ANSWERS, stream=st.booleans(), chat=st.booleans())
async def test_whatever_instances_answer(
    fuzzed: Fuzzed, log: Log, prefill: list[Raw], decode: list[Raw], stream: bool, chat: bool
) -> None:
    await _instances(fuzzed, log, prefill, decode, stream, chat)


@examples(40)
@given(state=_STATE)
async def test_whatever_instances_say_of_themselves(fuzzed: Fuzzed, log: Log, state: Any) -> None:
    await _states(fuzzed, log, state)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@examples(4000)
@given(sent=request())
async def test_whatever_many_clients_send(fuzzed: Fuzzed, log: Log, sent: tuple[list[bytes], bool]) -> None:
    await _clients(fuzzed, log, sent)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@examples(4000)
@given(prefill=_ANSWERS, decode=_ANSWERS, stream=st.booleans(), chat=st.booleans())
async def test_whatever_many_instances_answer(
    fuzzed: Fuzzed, log: Log, prefill: list[Raw], decode: list[Raw], stream: bool, chat: bool
) -> None:
    await _instances(fuzzed, log, prefill, decode, stream, chat)


@pytest.mark.slow
@examples(1000)
@given(state=_STATE)
async def test_whatever_many_instances_say(fuzzed: Fuzzed, log: Log, state: Any) -> None:
    await _states(fuzzed, log, state)


@pytest.mark.parametrize("status", [429, 500, 503, 599])
async def test_an_error_without_a_body_gets_words(fuzzed: Fuzzed, log: Log, status: int) -> None:
    """Found by the fuzz: the instance's empty body was passed on."""
    await fuzzed.ready()
    fuzzed.decode.script.extend([Raw([b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status])] * 2)
    body = b'{"model": "tiny", "prompt": "a"}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    got = await exchange(fuzzed.url, [head + body], DEADLINE_S)
    assert (got.status, json.loads(got.body)["error"]["message"]) == (status, "the instance failed")
    assert not complaints(log)


async def test_bytes_that_are_no_http_leave_no_traceback(fuzzed: Fuzzed, log: Log) -> None:
    """Found by the fuzz: anybody could fill the log, a key was not asked for."""
    packed = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd"
    for sent in (b"POST / HTTP/1.1 x\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", packed):
        got = await exchange(fuzzed.url, [sent], DEADLINE_S)
        assert got.status == 400
        assert says_why(got.body)
    assert not complaints(log)
    labels = {"reason": "bad_http"}
    assert fuzzed.router.metrics.registry.get_sample_value("vllm_suite_router_rejected_total", labels) >= 2


def test_the_encoding_keeps_what_only_python_reads() -> None:
    assert encoded({"a": float("nan")}) == b'{"a": NaN}'
