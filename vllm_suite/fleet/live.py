"""The router's live state on a terminal: what `vllm-suite top` draws."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_suite.fleet.status import NoFleet
from vllm_suite.router.ui import document as doc

if TYPE_CHECKING:
    import aiohttp
    from rich.console import Console, Group, RenderableType
    from rich.table import Table

TIMEOUT_S = 5.0
_MAX_BYTES = 4 << 20
_BAR = 12
_HEALTH = {"ok": "bold green", "degraded": "bold yellow", "down": "bold red"}
_ROWS = 64
_EVENTS = 8


@dataclass(frozen=True)
class Asked:
    """A router and the key of its live state."""

    router: str
    key: str | None = field(default=None, repr=False)


async def look(session: aiohttp.ClientSession, asked: Asked) -> doc.Live:
    """The state now. Raises NoFleet."""
    import aiohttp
    import msgspec

    url = asked.router + "/ui/state"
    headers = {"Authorization": f"Bearer {asked.key}"} if asked.key else {}
    try:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with session.get(url, headers=headers, timeout=timeout, allow_redirects=False) as response:
            if response.status == 401:
                raise NoFleet(f"{url} asks for a key: set VLLM_SUITE_API_KEY or VLLM_SUITE_CONTROL_KEY")
            if response.status != 200:
                raise NoFleet(f"{url} answered HTTP {response.status}")
            body = await response.content.read(_MAX_BYTES)
            while not response.content.at_eof():
                body += await response.content.read(_MAX_BYTES)
                if len(body) > _MAX_BYTES:
                    raise NoFleet(f"{url} answered more than {_MAX_BYTES} bytes")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise NoFleet(f"{url} gives no answer: {error or type(error).__name__}") from error
    try:
        state = msgspec.json.decode(body, type=doc.Live)
    except msgspec.MsgspecError as error:
        raise NoFleet(f"{url} answered something else: {error}") from error
    if state.version != doc.VERSION:
        raise NoFleet(f"{url} speaks version {state.version} of the live state, this is {doc.VERSION}")
    return state


async def watch(session: aiohttp.ClientSession, asked: Asked, console: Console, interval_s: float) -> int:
    """Redraw until q is pressed; a router that goes away is waited for, and said to be away."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    state = await look(session, asked)
    lost_at: float | None = None
    with _keys() as quit_, Live(screen(state), console=console, auto_refresh=False, screen=True) as live:
        while not quit_.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(quit_.wait(), interval_s)
            try:
                state, lost_at = await look(session, asked), None
                live.update(screen(state), refresh=True)
            except NoFleet as error:
                lost_at = lost_at or time.time()
                words = f"The router cannot be reached since {_clock(lost_at)}: {error}\nBelow: {_clock(state.time)}"
                live.update(Group(Text(words, style="bold red"), screen(state)), refresh=True)
    return 0 if lost_at is None and state.health != "down" else 1


@contextlib.contextmanager
def _keys() -> Iterator[asyncio.Event]:
    """Set once q is pressed. Where standard input is no terminal, never."""
    pressed = asyncio.Event()
    if not sys.stdin.isatty():
        yield pressed
        return
    import termios
    import tty

    fd, loop = sys.stdin.fileno(), asyncio.get_running_loop()
    before = termios.tcgetattr(fd)

    def read() -> None:
        if os.read(fd, 64).lower().startswith((b"q", b"\x03")):
            pressed.set()

    tty.setcbreak(fd)
    loop.add_reader(fd, read)
    try:
        yield pressed
    finally:
        loop.remove_reader(fd)
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def screen(state: doc.Live) -> Group:
    """Everything, the most urgent first."""
    from rich.columns import Columns
    from rich.console import Group
    from rich.text import Text

    head = Text.assemble(
        (state.health.upper(), _HEALTH[state.health]), "  ", state.headline, "  ", (_clock(state.time), "dim")
    )
    parts: list[RenderableType] = [head, _figures(state), Text(""), _members(state)]
    flows = _flows(state)
    if flows:
        parts += [Text(flows, style="cyan")]
    panels = [_latency(state)]
    if state.plan is not None:
        panels.append(_plan(state.plan))
    parts += [Text(""), Columns(panels, padding=(0, 4))]
    if state.events:
        parts += [Text(""), _events(state.events)]
    parts.append(Text(f"last {state.window_s:.0f} s · q ends", style="dim"))
    return Group(*parts)


def _figures(state: doc.Live) -> RenderableType:
    from rich.text import Text

    traffic, seen = state.traffic, {one.name: one for one in state.latency.seen}
    words = [
        f"{traffic.requests_per_s:.2f} requests/s",
        f"{traffic.in_flight} in flight",
        f"{_share(traffic.disaggregated)} disaggregated",
        f"TTFT p50 {_ms(seen['ttft'].p50)} p99 {_ms(seen['ttft'].p99)}",
        f"TPOT p50 {_ms(seen['tpot'].p50)} p99 {_ms(seen['tpot'].p99)}",
        *(f"{_share(one.attained)} {one.name} within {_ms(one.limit)}" for one in state.targets),
        f"{traffic.recoveries} recoveries",
    ]
    text = Text(" · ".join(words))
    if traffic.failed:
        text.append(f" · {traffic.failed} failed", style="bold red")
    return text


def _members(state: doc.Live) -> Table:
    from rich.markup import escape
    from rich.text import Text

    table = _table("role", "instance", "state", ("running", 1), ("waiting", 1), "load", ("KV", 1), "", ("router", 1))
    members = [(pool, member) for pool in state.pools for member in sorted(pool.members, key=lambda one: one.ready)]
    most = max([8, *((one.running or 0) + (one.waiting or 0) for _, one in members)])
    last = ""
    for pool, one in members[:_ROWS]:
        role = f"{pool.role} {pool.ready}/{pool.instances + pool.missing}" if pool.role != last else ""
        last = pool.role
        load = Text("█" * round(_BAR * (one.running or 0) / most), style="green")
        load.append("▒" * round(_BAR * (one.waiting or 0) / most), style="yellow")
        usage = one.kv_usage or 0.0
        kv = Text("█" * round(_BAR * usage), style="red" if usage > 0.9 else "blue")
        word = f"{one.phase} to {one.target}" if one.target else "ready" if one.ready else one.why_not
        style = "yellow" if one.target else "green" if one.ready else "bold red"
        table.add_row(
            role, escape(one.instance), Text(word, style=style), _count(one.running), _count(one.waiting), load,
            _share(one.kv_usage), kv, str(one.in_router),
        )  # fmt: skip
    left_out = len(members) - len(members[:_ROWS]) + sum(pool.left_out for pool in state.pools)
    if left_out:
        table.add_row("", Text(f"{left_out} more", style="dim"))
    return table


def _flows(state: doc.Live) -> str:
    moved = state.transfers
    flows: list[tuple[str, float | None, float | None]] = []
    if any(pool.role == "encode" for pool in state.pools):
        flows.append(("embeddings", moved.ec_bytes_per_s, None))
    flows.append(("KV blocks", moved.kv_bytes_per_s, moved.kv_pulls_per_s))
    return "   ".join(
        f"{name} {rate / 1e6:.1f} MB/s" + (f", {pulls:.1f} pulls/s" if pulls is not None else "")
        for name, rate, pulls in flows
        if rate is not None
    )


def _latency(state: doc.Live) -> Table:
    table = _table("latency", ("p50", 1), ("p99", 1), ("count", 1))
    for one in (*state.latency.stages, *state.latency.seen):
        if one.count:
            table.add_row(one.name.replace("_", " "), _ms(one.p50), _ms(one.p99), f"{one.count:,}")
    return table


def _plan(plan: doc.Plan) -> Table:
    from rich.text import Text

    table = _table("plan", ("promised", 1), ("band", 1), ("measured", 1), "verdict")
    styles = {"inside": "green", "quicker": "green", "slower": "bold red", "unknown": "dim"}
    for row in plan.rows:
        band = f"{_ms(row.low)} to {_ms(row.high)}"
        table.add_row(row.name, _ms(row.planned), band, _ms(row.measured), Text(row.verdict, style=styles[row.verdict]))
    table.add_row("requests/s", f"{plan.rate:.2f}", "", f"{plan.measured_rate:.2f}", "")
    return table


def _events(events: list[doc.Event]) -> Table:
    from rich.markup import escape

    table = _table("last", "event", "why", ("times", 1), "instance", "request")
    for one in events[:_EVENTS]:
        what, why = one.what.replace("_", " "), one.why.replace("_", " ")
        table.add_row(_clock(one.last), what, why, str(one.times), escape(one.instance), one.request)
    return table


def _table(*columns: str | tuple[str, int]) -> Table:
    """Columns by name; those in a pair are numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        name, justify = (column, "left") if isinstance(column, str) else (column[0], "right")
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    return table


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def _count(value: int | None) -> str:
    return "–" if value is None else str(value)


def _ms(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1000:.2f} s" if value >= 1000 else f"{value:.1f} ms" if value < 10 else f"{value:.0f} ms"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
