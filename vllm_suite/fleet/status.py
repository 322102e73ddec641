"""`vllm-suite status`: roles, load and KV transfers of a running fleet, as the router and the instances tell them."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_suite.fleet.scrape import Samples, scrape
from vllm_suite.fleet.state_file import STATE_FILE

if TYPE_CHECKING:
    import aiohttp
    from rich.table import Table

_TIMEOUT_S = 5.0
_NEEDED = {"instance_id", "role", "ready", "url"}


class NoFleet(RuntimeError):
    """There is nothing to ask; the text says what was tried."""


@dataclass(frozen=True)
class Source:
    """Where to ask. `control_key` opens /suite/v1 routes, `api_key` the instances' /metrics where it is asked for."""

    router: str
    control_key: str | None = None
    api_key: str | None = None
    log_dir: Path | None = None


def local_router(log_dir: Path) -> str:
    """The router of the fleet that `up` runs with that folder. Raises NoFleet."""
    for process in local_processes(log_dir):
        if process.get("role") == "router" and process.get("state") not in ("stopped", "failed"):
            return str(process["url"])
    raise NoFleet(f"no running fleet in {log_dir}; start one with `vllm-suite up` or give --url")


def local_processes(log_dir: Path) -> list[dict[str, Any]]:
    """What `up` last wrote of its processes; empty where it wrote nothing."""
    try:
        state = json.loads((log_dir / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return list(state.get("processes", [])) if isinstance(state, dict) else []


async def snapshot(session: aiohttp.ClientSession, source: Source) -> dict[str, Any]:
    """One look at the fleet, JSON types throughout. Raises NoFleet where the router gives no answer.

    Per instance: what the router lists, `metrics` (None where its /metrics gave no answer), and for a fleet
    of this machine `state` and `restarts`. `ok` is true where there is an instance and all are ready.
    """
    listed = await _instances(session, source)
    scrapes = await asyncio.gather(*(scrape(session, row["url"], source.api_key) for row in listed))
    processes = local_processes(source.log_dir) if source.log_dir else []
    local = {row["url"]: row for row in processes if row["role"] not in ("router", "controller")}
    rows: list[dict[str, Any]] = []
    for row, samples in zip(listed, scrapes, strict=True):
        known = local.pop(row["url"], {})
        extra = {key: value for key, value in known.items() if key in ("state", "restarts")}
        rows.append({**row, **extra, "metrics": transfers(samples) if samples else None})
    # The router forgets what does not answer; the processes say what became of it.
    for lost in local.values():
        if lost["state"] != "stopped":
            rows.append({"instance_id": lost["name"], "ready": False, "metrics": None, **lost})
    rows.sort(key=lambda row: (row["role"], row["instance_id"]))
    return {
        "router": source.router,
        "time": time.time(),
        "ok": bool(rows) and all(row["ready"] for row in rows),
        "controller": await _controller(session, processes),
        "instances": rows,
    }


def transfers(samples: Samples) -> dict[str, Any]:
    """What an instance counted of KV transfers and encoder outputs since its start."""
    return {
        "kv_pulls": samples.by("vllm_suite_kv_pulls_total", "outcome"),
        "kv_bytes_in": samples.total("vllm_suite_kv_pull_bytes_total", direction="in"),
        "kv_bytes_out": samples.total("vllm_suite_kv_pull_bytes_total", direction="out"),
        "kv_recomputes": samples.by("vllm_suite_kv_recomputes_total", "reason"),
        "kv_refused": samples.by("vllm_suite_kv_refused_total", "reason"),
        "kv_leases_outstanding": samples.total("vllm_suite_kv_leases_outstanding"),
        "kv_leases_ended": samples.by("vllm_suite_kv_leases_total", "end"),
        "ec_encoded": samples.total("vllm_suite_ec_encoded_items_total"),
        "ec_fetches": samples.by("vllm_suite_ec_fetches_total", "outcome"),
        "ec_bytes_in": samples.total("vllm_suite_ec_fetch_bytes_total"),
        "ec_local_encodes": samples.by("vllm_suite_ec_local_encodes_total", "reason"),
        "ec_refused": samples.by("vllm_suite_ec_refused_total", "reason"),
        "ec_pool_items": samples.total("vllm_suite_ec_pool_items"),
        "ec_pool_bytes": samples.total("vllm_suite_ec_pool_bytes"),
    }


async def _controller(session: aiohttp.ClientSession, processes: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The controller of role switching that `up` runs; None where it runs none. `looks` and `moves` by outcome."""
    found = next((row for row in processes if row["role"] == "controller"), None)
    if found is None:
        return None
    samples = await scrape(session, found["url"])
    counts = {
        short: samples.by(f"vllm_suite_roles_{short}_total", "outcome") if samples else {}
        for short in ("looks", "moves")
    }
    return {key: found[key] for key in ("name", "state", "restarts", "url")} | {"answers": samples is not None} | counts


async def _instances(session: aiohttp.ClientSession, source: Source) -> list[dict[str, Any]]:
    import aiohttp

    headers = {"Authorization": f"Bearer {source.control_key}"} if source.control_key else {}
    url = source.router + "/suite/v1/instances"
    try:
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        async with session.get(url, headers=headers, timeout=timeout) as response:
            if response.status == 401:
                raise NoFleet(f"{url} asks for a key: set VLLM_SUITE_CONTROL_KEY")
            if response.status != 200:
                raise NoFleet(f"{url} answered HTTP {response.status}")
            body = await response.json()
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise NoFleet(f"{url} gives no answer: {error or type(error).__name__}") from error
    rows = body.get("instances") if isinstance(body, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= _NEEDED for row in rows):
        raise NoFleet(f"{url} answered, and not as a router does; --url is the router's address")
    return rows


def table(now: dict[str, Any], before: dict[str, Any] | None = None) -> Table:
    """The snapshot for the screen; with an earlier one, transfer rates over the time between."""
    from rich.markup import escape
    from rich.table import Table

    result = Table(title=f"{now['router']}", title_justify="left", show_edge=False)
    result.add_column("instance")
    result.add_column("role")
    result.add_column("state")
    for name in ("running", "waiting", "KV used", "in router", "pulls", "in", "out", "MB/s", "recomputed", "leases"):
        result.add_column(name, justify="right")
    encodes = any(row["role"] == "encode" or _encodes(row["metrics"]) for row in now["instances"])
    if encodes:
        for name in ("encoded", "fetched", "in", "encoded locally", "kept"):
            result.add_column(name, justify="right")
    earlier = {row["instance_id"]: row for row in before["instances"]} if before else {}
    for row in now["instances"]:
        metrics = row["metrics"]
        cells = [""] * (11 if encodes else 6)
        if metrics is not None:
            old = (earlier.get(row["instance_id"]) or {}).get("metrics")
            rate = ""
            if old and before:
                # A restarted instance counts from zero again.
                moved = max(0.0, _bytes(metrics) - _bytes(old))
                rate = f"{moved / 1e6 / max(1e-9, now['time'] - before['time']):.1f}"
            cells = [
                f"{metrics['kv_pulls'].get('ok', 0):.0f}",
                f"{metrics['kv_bytes_in'] / 1e6:.1f} MB",
                f"{metrics['kv_bytes_out'] / 1e6:.1f} MB",
                rate,
                f"{sum(metrics['kv_recomputes'].values()):.0f}",
                f"{metrics['kv_leases_outstanding']:.0f}",
                *(_items(metrics) if encodes else ()),
            ]
        result.add_row(escape(row["instance_id"]), escape(row["role"]), _state(row), *_load(row), *cells)
    controller = now.get("controller")
    if controller is not None:
        asked = ", ".join(f"{count:.0f} {outcome}" for outcome, count in controller["moves"].items()) or "none"
        result.caption = f"{controller['name']}: {controller['state']}, switches asked for: {asked}"
        result.caption_justify = "left"
    return result


def _encodes(metrics: dict[str, Any] | None) -> bool:
    return metrics is not None and any(value for key, value in metrics.items() if key.startswith("ec_"))


def _items(metrics: dict[str, Any]) -> list[str]:
    return [
        f"{metrics['ec_encoded']:.0f}",
        f"{metrics['ec_fetches'].get('ok', 0):.0f}",
        f"{metrics['ec_bytes_in'] / 1e6:.1f} MB",
        f"{sum(metrics['ec_local_encodes'].values()):.0f}",
        f"{metrics['ec_pool_items']:.0f}: {metrics['ec_pool_bytes'] / 1e6:.1f} MB",
    ]


def _bytes(metrics: dict[str, Any]) -> float:
    return float(metrics["kv_bytes_in"] + metrics["kv_bytes_out"])


def _state(row: dict[str, Any]) -> str:
    text = "[green]ready[/]" if row["ready"] else f"[red]{row.get('state', 'not ready')}[/]"
    return text + (f", restarts: {row['restarts']}" if row.get("restarts") else "")


def _load(row: dict[str, Any]) -> list[str]:
    load = row.get("load") or {}
    usage = load.get("kv_usage")
    return [
        str(load.get("running", "")),
        str(load.get("waiting", "")),
        "" if usage is None else f"{100 * usage:.0f} %",
        str(row.get("outstanding_requests", "")),
    ]
