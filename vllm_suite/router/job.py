"""One client request on its way through the router."""

from __future__ import annotations

from dataclasses import dataclass, field

from aiohttp import web
from multidict import CIMultiDict

from vllm_suite.router.encode.plan import Plan
from vllm_suite.router.guard import Guard
from vllm_suite.router.policies import Demand
from vllm_suite.router.prompt import Prompt


@dataclass(slots=True)
class Job:
    """What the chain knows of a request; `make_job` in `intake` fills in the first half, the chain the rest."""

    request: web.Request
    prompt: Prompt
    headers: CIMultiDict[str]
    rid: str
    guard: Guard
    started: float  # time.perf_counter() when the body had been read
    stage: str = "decode"  # for the count of clients that leave
    path: str = "direct"
    tokens: int = 0
    hashes: list[int] | None = None
    demand: Demand = field(default=Demand(0, None))
    media: Plan | None = None  # from the encode stage, where the request has any
