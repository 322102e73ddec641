"""The control routes of router and instances, as the controller and the command line call them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_suite.identity import ROLES
from vllm_suite.roles.seen import Seen, Work

if TYPE_CHECKING:
    import aiohttp

TIMEOUT_S = 2.0
_POLL_S = 0.2
_LEAST_S = 0.1
_MAX_BYTES = 1 << 20


class NoAnswer(RuntimeError):
    """It could not be asked; the text says who and why."""


@dataclass(frozen=True)
class Access:
    """Where the router is, and the keys of the control routes there and on the instances."""

    router: str
    router_key: str | None = None
    instance_key: str | None = None


async def look(session: aiohttp.ClientSession, access: Access) -> tuple[list[Seen], list[str]]:
    """The instances that the router knows, asked themselves; and what those say of themselves that cannot be used.

    Raises NoAnswer where the router gives none: then nothing is known of the fleet.
    """
    rows = (await _get(session, access.router + "/suite/v1/instances", access.router_key)).get("instances")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and isinstance(row.get("url"), str) for row in rows):
        raise NoAnswer(f"{access.router} answered, and not as a router does: no list of instances")
    urls = [row["url"] for row in rows]
    answers = await asyncio.gather(
        *(_get(session, url + "/suite/v1/state", access.instance_key) for url in urls), return_exceptions=True
    )
    seen: list[Seen] = []
    troubles: list[str] = []
    for url, answer in zip(urls, answers, strict=True):
        if isinstance(answer, dict):
            one = read(url, answer)
            if one is not None:
                seen.append(one)
            else:
                troubles.append(f"{url}: its state does not tell its role")
        elif isinstance(answer, NoAnswer):
            troubles.append(str(answer))
        else:
            raise answer
    seen.sort(key=lambda one: one.instance_id)
    return seen, troubles


def read(url: str, state: dict[str, Any]) -> Seen | None:
    """One state document; None where it is not one of an instance that knows about roles."""
    load = state.get("load") if isinstance(state.get("load"), dict) else {}
    assert isinstance(load, dict)
    names, numbers = ("instance_id", "epoch", "role", "phase"), ("role_epoch",)
    if not all(isinstance(state.get(name), str) for name in names) or state["role"] not in ROLES:
        return None
    if not all(type(state.get(name)) is int for name in numbers):
        return None
    can = state.get("can")
    return Seen(
        instance_id=state["instance_id"],
        url=url,
        epoch=state["epoch"],
        role=state["role"],
        role_epoch=state["role_epoch"],
        phase=state["phase"],
        ready=state.get("ready") is True and state.get("draining") is not True,
        can=tuple(role for role in can if role in ROLES) if isinstance(can, list) else (),
        queue=_count(load.get("waiting")),
        running=_count(load.get("running")),
        work=_work(state.get("work")),
    )


async def switch(
    session: aiohttp.ClientSession,
    one: Seen,
    target: str,
    key: str | None,
    give_back: bool = False,
    older: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Ask an instance to become `target`, if it is still as it was seen. Its answer; raises NoAnswer.

    `give_back`: what waits on it goes back to the router, since others take it (`seen.others_take`). An instance of a
    version without that refuses the whole body; it is asked once more without it, and `older` is called.
    """
    url, began = one.url + "/suite/v1/role", time.monotonic()
    body: dict[str, Any] = {"role": target, "epoch": one.epoch, "role_epoch": one.role_epoch}
    if not give_back:
        return (await _call(session, "POST", url, key, body))[1]
    status, answer = await _call(session, "POST", url, key, {**body, "give_back": True})
    if status != 400 or answer.get("reason") != "malformed":
        return answer
    older()
    # Both together take no longer than one may: whoever holds a lease counts on it.
    left = max(TIMEOUT_S - (time.monotonic() - began), _LEAST_S)
    return (await _call(session, "POST", url, key, body, left))[1]


async def role(session: aiohttp.ClientSession, url: str, key: str | None) -> dict[str, Any]:
    """What an instance says about its role and its last switch. Raises NoAnswer."""
    return await _get(session, url + "/suite/v1/role", key)


async def ended(
    session: aiohttp.ClientSession, one: Seen, begun: dict[str, Any], key: str | None, timeout_s: float
) -> dict[str, Any]:
    """What an instance says once the switch has ended that it has `begun`: the answer of `switch`.

    Late answers are waited for. Raises NoAnswer, also where it was restarted or switched by somebody else, or has not
    ended in `timeout_s` seconds.
    """
    attempt, now = (begun.get("last") or {}).get("attempt"), begun
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    now = await role(session, one.url, key)
                except NoAnswer as error:
                    if not isinstance(error.__cause__, TimeoutError):
                        raise
                    continue  # busy with the switch, or with the work before it
                last = now.get("last") or {}
                if now.get("epoch") != one.epoch or last.get("attempt") != attempt:
                    raise NoAnswer(f"{one.instance_id} was restarted, or switched by somebody else, meanwhile")
                if last.get("outcome") is not None:
                    return now
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        text = f"the switch has not ended in {timeout_s:g} s: {one.instance_id} is {now.get('phase')}"
        raise NoAnswer(f"{text}; it goes on, `vllm-suite roles status` shows it") from None


def _work(found: Any) -> Work | None:
    if not isinstance(found, dict) or not isinstance(found.get("arrived"), dict):
        return None
    arrived = {str(stage): _count(count) for stage, count in found["arrived"].items()}
    names = ("finished", "prompt_tokens", "output_tokens", "generated")
    return Work(arrived, *(_count(found.get(name)) for name in names))


def _count(value: object) -> int:
    return value if type(value) is int and value > 0 else 0


async def _get(session: aiohttp.ClientSession, url: str, key: str | None) -> dict[str, Any]:
    status, found = await _call(session, "GET", url, key, None)
    if status != 200:
        raise NoAnswer(f"{url} answered HTTP {status}")
    return found


async def _call(
    session: aiohttp.ClientSession, method: str, url: str, key: str | None, body: Any, timeout_s: float = TIMEOUT_S
) -> tuple[int, dict[str, Any]]:
    """Status and document."""
    import aiohttp
    import msgspec

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with session.request(
            method, url, json=body, headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            if response.status == 401:
                raise NoAnswer(f"{url} asks for another key: set VLLM_SUITE_CONTROL_KEY")
            raw = b""
            async for piece in response.content.iter_chunked(1 << 16):
                raw += piece
                if len(raw) > _MAX_BYTES:
                    raise NoAnswer(f"{url} answered more than {_MAX_BYTES} bytes")
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise NoAnswer(f"{url} gives no answer: {error or type(error).__name__}") from error
    try:
        found = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise NoAnswer(f"{url} answered HTTP {response.status} and no JSON object")
    return response.status, found
