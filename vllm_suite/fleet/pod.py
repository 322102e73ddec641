"""What Kubernetes runs inside a pod of the fleet: readiness, drain, and the chart's test.

    python3 -m vllm_suite.fleet.pod ready --role prefill --connector SuiteNixlConnector
    python3 -m vllm_suite.fleet.pod router-ready
    python3 -m vllm_suite.fleet.pod drain --settle 10 --finish 300
    python3 -m vllm_suite.fleet.pod check --router http://llm-router --decode http://llm-decode:8000

Probes run every few seconds and in every container, so this is the standard library alone. An exec probe has the keys
in its environment; one by HTTP would have to carry them in the pod's spec. Exit status 0 means yes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

_IDLE_LOOKS = 3  # a request that is between prefill and decode is nowhere for a moment
_SILENT_LOOKS = 6  # a busy instance may answer late; one that stays silent has nothing to wait for
_LEASES_S = 20.0  # somewhat more than the 15 s that a prefill instance keeps blocks nobody has claimed
_SWITCHING = ("closing", "drained", "switching", "verified", "restoring")  # of vllm_suite.roles.state
_LEASES = "vllm_suite_kv_leases_outstanding"
_PULLS = "vllm_suite_kv_pulls_total"
_DECISIONS = "vllm_suite_router_decisions_total"
_RECOVERIES = "vllm_suite_router_recoveries_total"


class CheckFailed(Exception):
    """What was asked for is not so; the text says what was found."""


def bearer(names: Sequence[str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The header with the first of these keys that is set; empty where none is."""
    key = next((environ[name] for name in names if environ.get(name)), None)
    return {"Authorization": f"Bearer {key}"} if key else {}


CONTROL_KEYS = ("VLLM_SUITE_CONTROL_KEY", "VLLM_API_KEY")
CLIENT_KEYS = ("VLLM_SUITE_API_KEY",)


def connect(url: str, timeout_s: float) -> http.client.HTTPConnection:
    """One connection to `url`, which stays: a Service gives each connection its own pod. Raises OSError."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=timeout_s)
    connection.connect()
    connection.auto_open = 0
    return connection


def call(
    connection: http.client.HTTPConnection, path: str, headers: Mapping[str, str], body: Any = None
) -> tuple[int, str]:
    """Status and text. Raises OSError and http.client.HTTPException."""
    data = None if body is None else json.dumps(body).encode()
    given = dict(headers) if data is None else {**headers, "Content-Type": "application/json"}
    connection.request("GET" if data is None else "POST", path, body=data, headers=given)
    response = connection.getresponse()
    return response.status, response.read().decode("utf-8", "replace")


def ask(url: str, path: str, keys: Sequence[str], timeout_s: float) -> str:
    """The text of a 200 answer. Raises CheckFailed, OSError and http.client.HTTPException."""
    connection = connect(url, timeout_s)
    try:
        status, text = call(connection, path, bearer(keys))
    finally:
        connection.close()
    if status != 200:
        raise CheckFailed(f"{path} answered {status}: {text[:200]}")
    return text


def total(metrics: str, name: str, **labels: str) -> float:
    """Sum of a series' samples that carry these labels, from Prometheus text."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    found = 0.0
    for line in metrics.splitlines():
        if line.startswith((name + "{", name + " ")) and all(pair in line for pair in wanted):
            found += float(line.rpartition("}")[2].split()[0] if "}" in line else line.split()[1])
    return found


def ready(url: str, role: str | None, connector: str | None, timeout_s: float) -> str:
    """Raises CheckFailed unless the instance at `url` is loaded, answering, of that role and with that connector.

    One of `any` may have taken another role. While it changes it stays ready for Kubernetes: routers ask it themselves
    and send nothing, and one that left their list would be missed by the controller.
    """
    state = json.loads(ask(url, "/suite/v1/state", CONTROL_KEYS, timeout_s))
    if role == "any":
        if state.get("phase") in _SWITCHING:
            return f"changing its role: {state['phase']}"
        role = None
    if state.get("ready") is not True or state.get("draining") is True:
        raise CheckFailed(f"not ready: {state}")
    if role is not None and state.get("role") != role:
        raise CheckFailed(f"its role is {state.get('role')!r}, not {role!r}")
    if connector is not None and state.get("kv_connector") != connector:
        raise CheckFailed(f"its KV connector is {state.get('kv_connector')!r}, not {connector!r}")
    return "ready"


def work(url: str, timeout_s: float) -> tuple[int, float]:
    """Requests in the instance at `url`, and leases of KV blocks that a peer has yet to fetch.

    The server counts requests at its door, the engine by vLLM's gauges, which `--disable-log-stats` leaves out.
    """
    state = json.loads(ask(url, "/suite/v1/state", CONTROL_KEYS, timeout_s))
    load, inside = state.get("load") or {}, state.get("running") or {}
    in_engine = int(load.get("running", 0)) + int(load.get("waiting", 0))
    requests = max(in_engine, sum(int(count) for count in inside.values()))
    return requests, total(ask(url, "/metrics", (), timeout_s), _LEASES)


def drain(
    url: str,
    settle_s: float,
    finish_s: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Wait until routers have stopped sending, then until nothing runs. Raises CheckFailed at the deadline, and where
    nobody is there or gives a good answer for several looks: one late answer must not cost the requests that run.

    Leases are waited for `_LEASES_S` at most once no request runs: their gauge comes with engine steps, so that of an
    instance without work may be old.
    """
    sleep(settle_s)
    end, looks, idle_since, silent = clock() + finish_s, 0, clock(), 0
    while True:
        try:
            requests, leases = work(url, 5.0)
        except (OSError, http.client.HTTPException, ValueError, CheckFailed) as error:
            silent += 1
            if isinstance(error, ConnectionRefusedError) or silent >= _SILENT_LOOKS or clock() > end:
                raise CheckFailed(f"the instance does not answer, nothing to wait for: {error!r}") from error
            looks = 0
            sleep(1.0)
            continue
        now, silent = clock(), 0
        if requests:
            looks, idle_since = 0, now
        else:
            looks += 1
        if looks >= _IDLE_LOOKS and (not leases or now - idle_since > _LEASES_S):
            return "drained"
        if now > end:
            raise CheckFailed(f"after {finish_s:g} s still {requests} requests, {leases:g} leases")
        sleep(1.0)


def outlive(leader: str, limit_s: float) -> str:
    """Wait until nobody listens at `leader` any more: a worker that leaves before its leader ends the leader's work.

    Raises CheckFailed after `limit_s` seconds.
    """
    end, silent = time.monotonic() + limit_s, 0
    while time.monotonic() < end:
        try:
            connect(leader, 2.0).close()
            silent = 0
        except TimeoutError:  # a lost packet, or a leader that is too busy: not the end yet
            silent += 1
            if silent >= _SILENT_LOOKS:
                return "the leader is silent"
        except OSError:
            return "the leader has ended"
        time.sleep(1.0)
    raise CheckFailed(f"after {limit_s:g} s the leader still listens")


def pulls(decode: Sequence[str], timeout_s: float) -> float:
    """Pulls that went well, over all instances behind the names of headless Services."""
    urls = set()
    for service in decode:
        parts = urlsplit(service)
        port = parts.port or 80
        found = socket.getaddrinfo(parts.hostname, port, family=socket.AF_INET, type=socket.SOCK_STREAM)
        urls |= {f"http://{entry[4][0]}:{port}" for entry in found}
    return sum(total(ask(url, "/metrics", (), timeout_s), _PULLS, outcome="ok") for url in sorted(urls))


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
    sent = total(after, _DECISIONS, path="disaggregated") - total(before, _DECISIONS, path="disaggregated")
    failed = total(after, _RECOVERIES) - total(before, _RECOVERIES)
    if sent < 1:
        raise CheckFailed("the router sent the prompt straight to decode; its decisions_total says why")
    end = time.monotonic() + timeout_s
    while (pulled := pulls(decode, timeout_s) - before_pulls) < 1:
        if time.monotonic() > end:
            raise CheckFailed(f"decode pulled no KV blocks; the router took {failed:g} recovery steps")
        time.sleep(0.5)
    return f"disaggregated: {usage['prompt_tokens']} prompt tokens prefilled, {pulled:g} pulls, {failed:g} recoveries"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="vllm_suite.fleet.pod", description="What Kubernetes asks a pod.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("ready", "router-ready", "drain"):
        verbs.add_parser(name).add_argument("--url", required=True)
    verbs.choices["ready"].add_argument("--role")
    verbs.choices["ready"].add_argument("--connector")
    verbs.choices["drain"].add_argument("--settle", type=float, required=True)
    verbs.choices["drain"].add_argument("--finish", type=float, required=True)
    stay = verbs.add_parser("outlive")
    stay.add_argument("--port", type=int, required=True)
    stay.add_argument("--limit", type=float, required=True)
    test = verbs.add_parser("check")
    test.add_argument("--router", required=True)
    test.add_argument("--decode", action="append", default=[], help="where instances that decode are; several times")
    test.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds for each answer; comes before the verb")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 where the answer is yes; the reason is printed either way."""
    args = parser().parse_args(argv)
    try:
        if args.verb == "ready":
            said = ready(args.url, args.role, args.connector, args.timeout)
        elif args.verb == "router-ready":
            said = ask(args.url, "/ready", CLIENT_KEYS, args.timeout)[:200]
        elif args.verb == "drain":
            said = drain(args.url, args.settle, args.finish)
        elif args.verb == "outlive":
            # Kubernetes does not expand variables in a hook's command.
            said = outlive(f"http://{os.environ['LWS_LEADER_ADDRESS']}:{args.port}", args.limit)
        else:
            said = check(args.router, args.decode, args.prompt_tokens, args.timeout)
    except (CheckFailed, OSError, http.client.HTTPException, ValueError, LookupError) as error:
        print(f"{args.verb}: {str(error) or repr(error)}", file=sys.stderr)
        return 1
    print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
