"""One client request on its way through the router."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiohttp import web
from multidict import CIMultiDict

from vllm_suite.router.encode.plan import Plan
from vllm_suite.router.guard import Guard
from vllm_suite.router.members import Member
from vllm_suite.router.policies import Demand
from vllm_suite.router.prompt import Prompt
from vllm_suite.router.room import Share
from vllm_suite.router.tracing import OFF, Trace

if TYPE_CHECKING:
    from vllm_suite.router.relay import Opened


@dataclass(slots=True)
class Job:
    """What the chain knows of a request; `make_job` in `intake` fills in the first half, the chain the rest."""

    request: web.Request
    prompt: Prompt
    headers: CIMultiDict[str]
    rid: str
    guard: Guard
    started: float  # time.perf_counter() when the body had been read
    share: Share  # of the room for bodies
    stage: str = "decode"  # for the count of clients that leave
    path: str = "direct"
    tokens: int = 0
    hashes: list[int] | None = None
    demand: Demand = field(default=Demand(0, None))
    media: Plan | None = None  # from the encode stage, where the request has any
    prefilled: Member | None = None  # whose KV blocks the reference names
    answer: Opened | None = None  # the one that the client gets
    laps: dict[str, float] = field(default_factory=dict)  # seconds by stage, for `times`
    lapped: float = 0.0
    trace: Trace = OFF

    def forget_body(self) -> None:
        """Nothing is sent any more: let go of the bytes, which a long answer would otherwise keep for its time."""
        prompt = self.prompt
        prompt.body = prompt.text = b""
        prompt.document = prompt.token_ids = None
        if self.media is not None:
            self.media.forget_media()
        self.share.release()

    def lap(self, stage: str) -> None:
        """All that went by since the last lap, or since the start, was `stage`."""
        now = time.perf_counter()
        self.laps[stage] = self.laps.get(stage, 0.0) + now - (self.lapped or self.started)
        self.lapped = now

    def moved(self, source: str, target: str, seconds: float) -> None:
        """So much of one stage was, as an instance says, another; never more than it took."""
        seconds = min(max(seconds, 0.0), self.laps.get(source, 0.0))
        self.laps[source] = self.laps.get(source, 0.0) - seconds
        self.laps[target] = self.laps.get(target, 0.0) + seconds
