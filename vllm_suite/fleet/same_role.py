"""The role that an instance of `pools.any` has by switching, over a restart that was asked for.

A new process has role `any`. It is switched before the router lists it: nothing has to be drained, and a controller
does not see it in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_suite.fleet.launch import Launch
from vllm_suite.fleet.process import ask
from vllm_suite.identity import Role
from vllm_suite.roles.client import NoAnswer, ended, read, switch

if TYPE_CHECKING:
    import aiohttp

SWITCH_S = 60.0
"""An instance without requests has switched, or is back in its old role, before that: see the phases' deadlines."""


async def role_of(session: aiohttp.ClientSession, launch: Launch) -> Role | None:
    """The role that an instance has now; None where it does not say, as a plain vLLM does not."""
    seen = read(launch.url, await ask(session, launch) or {})
    return None if seen is None else seen.role


async def switch_again(session: aiohttp.ClientSession, launch: Launch, role: Role) -> str | None:
    """Make a restarted instance a `role` and wait until it is; None, or why it is not."""
    one = read(launch.url, await ask(session, launch) or {})
    if one is None:
        return "it does not tell its role"
    try:
        answer = await switch(session, one, role, launch.control_key)
        if answer.get("outcome") == "begun":
            now = await ended(session, one, answer, launch.control_key, SWITCH_S)
            if now["last"]["outcome"] == "switched":
                return None
            return f"{now['last']['reason']}; it is {now['role']} and {now['phase']}"
    except NoAnswer as error:
        return str(error)
    return None if answer.get("outcome") == "noop" else str(answer.get("error"))
