"""The chart's test: a request through the router, proven to be disaggregated."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Sequence
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
    status, text = call(connection, "/v1/models", headers)
    if status != 200:
        raise CheckFailed(f"/v1/models answered {status}: {text[:300]}")
    model = json.loads(text)["data"][0]["id"]
    _, before = call(connection, "/metrics", headers)
    # New words each time: a prompt that decode has cached would not be sent to prefill.
    draw = random.Random(time.time_ns())  # any number will do
    words = " ".join(str(draw.randrange(10**6)) for _ in range(prompt_tokens))
    body = {"model": model, "prompt": words, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    status, text = call(connection, "/v1/completions", headers, body)
    if status != 200:
        raise CheckFailed(f"/v1/completions answered {status}: {text[:300]}")
    usage = json.loads(text)["usage"]
    if usage["completion_tokens"] != 16:
        raise CheckFailed(f"asked for 16 tokens, got {usage}")
    if not decode:
        return f"answered: {usage['prompt_tokens']} prompt tokens, 16 output tokens"
    _, after = call(connection, "/metrics", headers)
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
