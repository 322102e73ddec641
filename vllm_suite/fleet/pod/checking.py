"""The chart's test: a request through the router, proven to be disaggregated."""

from __future__ import annotations

import http.client
import json
import random
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from vllm_suite.fleet.pod.asking import CLIENT_KEYS, CheckFailed, ask, bearer, call, connect, total

PULLS = "vllm_suite_kv_pulls_total"
DECISIONS = "vllm_suite_router_decisions_total"
RECOVERIES = "vllm_suite_router_recoveries_total"


def pulls(decode: Sequence[str], timeout_s: float) -> float:
    """Pulls that went well, over all instances behind the names of headless Services."""
    urls = set()
    for service in decode:
        parts = urlsplit(service)
        port = parts.port or 80
        found = socket.getaddrinfo(parts.hostname, port, family=socket.AF_INET, type=socket.SOCK_STREAM)
        urls |= {f"http://{entry[4][0]}:{port}" for entry in found}
    return sum(total(ask(url, "/metrics", (), timeout_s), PULLS, outcome="ok") for url in sorted(urls))


def check(router: str, decode: Sequence[str], prompt_tokens: int, timeout_s: float) -> str:
    """Send one long prompt through the router. With `decode` it must have gone through prefill and its KV blocks have
    been pulled. Raises CheckFailed.
    """
    before_pulls = pulls(decode, timeout_s) if decode else 0.0
    connection = connect(router, timeout_s)
    headers = bearer(CLIENT_KEYS)
    model = json.loads(_good(connection, "/v1/models", headers))["data"][0]["id"]
    before = _good(connection, "/metrics", headers)
    # New words each time: a prompt that decode has cached would not be sent to prefill.
    draw = random.Random(time.time_ns())  # any number will do
    words = " ".join(str(draw.randrange(10**6)) for _ in range(prompt_tokens))
    body = {"model": model, "prompt": words, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    usage = json.loads(_good(connection, "/v1/completions", headers, body))["usage"]
    if usage["completion_tokens"] != 16:
        raise CheckFailed(f"asked for 16 tokens, got {usage}")
    if not decode:
        return f"answered: {usage['prompt_tokens']} prompt tokens, 16 output tokens"
    after = _good(connection, "/metrics", headers)
    sent = total(after, DECISIONS, path="disaggregated") - total(before, DECISIONS, path="disaggregated")
    failed = total(after, RECOVERIES) - total(before, RECOVERIES)
    if sent < 1:
        raise CheckFailed("the router sent the prompt straight to decode; its decisions_total says why")
    end = time.monotonic() + timeout_s
    while (pulled := pulls(decode, timeout_s) - before_pulls) < 1:
        if time.monotonic() > end:
            raise CheckFailed(f"decode pulled no KV blocks; the router took {failed:g} recovery steps")
        time.sleep(0.5)
    return f"disaggregated: {usage['prompt_tokens']} prompt tokens prefilled, {pulled:g} pulls, {failed:g} recoveries"


def _good(connection: http.client.HTTPConnection, path: str, headers: Mapping[str, str], body: Any = None) -> str:
    """The text of a 200 answer; every other one is said, that to `/metrics` too: its counts are compared."""
    try:
        status, text = call(connection, path, headers, body)
    except http.client.NotConnected as error:
        raise CheckFailed(f"{path}: the router had closed the connection after the answer before") from error
    if status != 200:
        raise CheckFailed(f"{path} answered {status}: {text[:300]}")
    return text
