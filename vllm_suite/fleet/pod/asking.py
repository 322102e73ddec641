"""Questions to an instance or a router over HTTP, and the first of them: whether an instance is ready."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

CONTROL_KEYS = ("VLLM_SUITE_CONTROL_KEY", "VLLM_API_KEY")
CLIENT_KEYS = ("VLLM_SUITE_API_KEY",)
_SWITCHING = ("closing", "drained", "switching", "verified", "restoring")  # of vllm_suite.roles.state


class CheckFailed(Exception):
    """What was asked for is not so; the text says what was found."""


def bearer(names: Sequence[str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The header with the first of these keys that is set; empty where none is."""
    key = next((environ[name] for name in names if environ.get(name)), None)
    return {"Authorization": f"Bearer {key}"} if key else {}


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
