"""A run as a Chrome trace: engines as tracks with their steps, requests with their stages; Perfetto opens it.

The format is Google's "Trace Event Format": complete events (X) for steps, nestable asynchronous events (b, e) for
requests, counters (C) for the sequences of each engine, metadata (M) for names. Times are microseconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_suite.planner.observing import PoolOf
from vllm_suite.planner.plan import Plan
from vllm_suite.planner.simulator.encoders import Encoder
from vllm_suite.planner.simulator.engine import Engine
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.sources.steps import DecodeLine, Steps

_REQUESTS = 1_000_000


class Timeline:
    """An observer, and with `served` a sink, that keeps the events of a stretch of the run.

    Args:
        plan: that is run.
        begin, seconds: the stretch; a step or a request belongs to it by its start.
        most: events at most, so that a file can be opened; what comes later is left out and counted in `dropped`.
    """

    def __init__(self, plan: Plan, begin: float = 0.0, seconds: float = 30.0, most: int = 100_000) -> None:
        self.begin, self.end, self.most, self.dropped = begin, begin + seconds, most, 0
        self._pool, self._roles = PoolOf(plan), [pool.role for pool in plan.pools]
        self._events: list[dict[str, Any]] = []
        self._tracks: dict[tuple[int, int], str] = {}

    def __call__(
        self, engine: Engine, start: float, end: float, count: int, steps: Steps, line: DecodeLine | None
    ) -> None:
        """See `engine.Observer`. Steps that only decode come as one event with their number."""
        if not self.begin <= start < self.end:
            return
        role = self._pool(engine).role
        track = (self._roles.index(role) + 1, engine.number)
        self._tracks[track] = role
        decode, tokens = int(steps.decode_sequences), int(steps.prefill_tokens)
        if tokens:
            name = f"prompt {tokens}" + (f" + decode {decode}" if decode else "")
        else:
            name = f"decode {decode}" + (f" x {count} steps" if count > 1 else "")
        place = {"pid": track[0], "tid": track[1], "ts": start * 1e6}
        args = {"steps": count, "prompt_tokens": tokens, "prompts": int(steps.prefill_chunks), "sequences": decode,
                "context": int(steps.decode_context)}  # fmt: skip
        self._add(
            {"ph": "X", "cat": "prompt" if tokens else "decode", "name": name, "dur": (end - start) * 1e6, **place,
             "args": args},
            {"ph": "C", "name": f"sequences of {role} {engine.number}", "pid": track[0], "ts": start * 1e6,
             "args": {"running": len(engine.running), "waiting": len(engine.waiting)}},
        )  # fmt: skip

    def encoded(self, encoder: Encoder, start: float, end: float, items: int) -> None:
        """See `EncodeObserver`."""
        if not self.begin <= start < self.end:
            return
        track = (self._roles.index("encode") + 1, encoder.place.number)
        self._tracks[track] = "encode"
        self._add({"ph": "X", "cat": "encode", "name": f"encode {items}", "pid": track[0], "tid": track[1],
                   "ts": start * 1e6, "dur": (end - start) * 1e6, "args": {"items": items}})  # fmt: skip

    def served(self, request: Served) -> None:
        """A sink: the request's stages, if it arrived in the stretch."""
        if not self.begin <= request.arrival < self.end:
            return
        stages = (
            ("encode", request.encode_start, request.encoded),
            ("fetch", request.encoded, request.fetched),
            ("prefill", request.prefill_start, request.prefilled),
            ("transfer", request.transfer_start, request.transferred),
            ("decode", request.first_token, request.last_token),
        )
        args = {"prompt": request.prompt, "output": request.output, "ttft_ms": request.ttft * 1e3,
                "tpot_ms": request.tpot * 1e3, "preemptions": request.preemptions}  # fmt: skip
        events = self._span(f"request {request.number}", request.number, request.arrival, request.last_token, args)
        for name, start, end in stages:
            # A stage that the request did not go through is nan, and equal to nothing.
            if start == start and end == end:
                events += self._span(name, request.number, start, end, {})
        # Nested spans have to begin after what holds them begins, and end before it ends.
        self._add(*sorted(events, key=lambda event: event["ts"]))

    @staticmethod
    def _span(name: str, number: int, start: float, end: float, args: dict[str, Any]) -> list[dict[str, Any]]:
        both = {"cat": "request", "id": number, "pid": _REQUESTS, "tid": 0, "name": name}
        return [{"ph": "b", "ts": start * 1e6, **both, "args": args}, {"ph": "e", "ts": end * 1e6, **both, "args": {}}]

    def _add(self, *events: dict[str, Any]) -> None:
        if len(self._events) + len(events) > self.most:
            self.dropped += len(events)
        else:
            self._events += events

    def as_json(self) -> dict[str, Any]:
        """The whole document."""
        names: list[dict[str, Any]] = []
        for pid, role in enumerate(self._roles, start=1):
            names.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"pool {role}"}})
        for (pid, tid), name in sorted(self._tracks.items()):
            names.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": f"{name} {tid}"}})
        names.append({"ph": "M", "name": "process_name", "pid": _REQUESTS, "args": {"name": "requests"}})
        return {
            "traceEvents": names + self._events,
            "displayTimeUnit": "ms",
            "otherData": {"begin_s": self.begin, "end_s": self.end, "dropped_events": self.dropped},
        }

    def write(self, path: Path) -> None:
        """As a file that Perfetto opens."""
        path.write_text(json.dumps(self.as_json(), separators=(",", ":"), allow_nan=False), encoding="utf-8")
