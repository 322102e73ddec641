"""Which requests of an engine are queued and not begun, by the names that their senders gave them.

Nothing is changed: between this answer and the end of such a request the engine may begin it. Nothing is lost by that,
since nothing of its answer has left the server and it holds nothing of another instance; the work is done elsewhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

METHOD = "suite_role_queue"
# vLLM's names of engine requests: the kind, X-Request-Id, and for completions the number of the prompt.
_COMPLETION = re.compile(r"cmpl-(.+)-([0-9]+)", re.DOTALL)
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
    """Those of `names` of which every engine request is among `waiting`; `states` are the front end's, by id.

    The front end forgets the parts of a request that are done, prompts of several and sequences of `n`. Where one is
    missing something was begun.
    """
    prompts: dict[str, set[int]] = {}
    sequences: Counter[str] = Counter()
    begun: set[str] = set()
    for request_id, state in states:
        name, prompt = part_of(state.external_req_id)
        if name not in names:
            continue
        prompts.setdefault(name, set()).add(prompt)
        # Down from as many as there are in all: 0 is left where all are there.
        key, parent = state.external_req_id, state.parent_req
        if key not in sequences:
            sequences[key] = parent.n if parent is not None else 1
        sequences[key] -= 1
        if request_id not in waiting:
            begun.add(name)
    begun |= {part_of(key)[0] for key, missing in sequences.items() if missing}
    return {name for name, found in prompts.items() if name not in begun and len(found) == max(found) + 1}


def part_of(request: str) -> tuple[str, int]:
    """`X-Request-Id` and number of the prompt of an engine request as the front end calls it; no name for what is
    neither completion nor chat.
    """
    if request.startswith(_CHAT):
        return request.removeprefix(_CHAT), 0
    match = _COMPLETION.fullmatch(request)
    return (match[1], int(match[2])) if match else ("", 0)
