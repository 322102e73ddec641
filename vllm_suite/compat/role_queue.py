"""Which requests of an engine are queued and not begun, by the names that their senders gave them.

Nothing is changed: between this answer and the end of such a request the engine may begin it. Nothing is lost by that,
since nothing of its answer has left the server and it holds nothing of another instance; the work is done elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

METHOD = "suite_role_queue"
# vLLM's names of engine requests: the kind, X-Request-Id, and for completions the number of the prompt.
_COMPLETION = re.compile(r"cmpl-(.+)-[0-9]+", re.DOTALL)
_CHAT = "chatcmpl-"


def install() -> None:
    """Let API servers ask the engine in this process."""
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, METHOD, queued)


def queued(core: Any) -> list[str]:
    """Ids of the requests that wait, were never scheduled, and have no reference to another instance's KV blocks.

    A reference is claimed by the instance that has it, and given up with the request.
    """
    from vllm.v1.request import RequestStatus

    return [
        request.request_id
        for request in core.scheduler.requests.values()
        if request.status == RequestStatus.WAITING
        and not (request.num_computed_tokens or request.num_output_tokens or request.num_preemptions)
        and not (request.kv_transfer_params or {}).get("do_remote_prefill")
    ]


def untouched(names: Collection[str], states: Iterable[tuple[str, Any]], waiting: Collection[str]) -> set[str]:
    """Those of `names` of which every engine request is among `waiting`; `states` are the front end's, by id."""
    found: dict[str, bool] = {}
    for request_id, state in states:
        name = name_of(state.external_req_id)
        if name in names:
            found[name] = found.get(name, True) and request_id in waiting
    return {name for name, all_wait in found.items() if all_wait}


def name_of(request: str) -> str:
    """`X-Request-Id` of an engine request as the front end calls it; empty for what is neither completion nor chat."""
    if request.startswith(_CHAT):
        return request.removeprefix(_CHAT)
    match = _COMPLETION.fullmatch(request)
    return match[1] if match else ""
