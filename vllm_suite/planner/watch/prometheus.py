"""Rate and lengths of a running fleet's requests, from vLLM's own series through Prometheus' HTTP API."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_suite.planner.watch.window import Histogram, WatchError, Window

REQUESTS = "vllm:request_success_total"
PROMPTS = "vllm:request_prompt_tokens"
OUTPUTS = "vllm:request_generation_tokens"
_LARGEST = 64 * 2**20


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus server.

    In a fleet with prefill and decode instances every request is finished on both, so `selector` has to name the decode
    instances (or, for a colocated fleet, nothing).

    Attributes:
        url: for example ``http://prometheus:9090``, with user and password where it asks for them.
        selector: label matchers, as in ``job="decode",model_name="m"``.
        step: seconds of a window; several scrape intervals, at least two.
        timeout: seconds for one answer.
        lag: seconds by which the newest samples may be behind: a scrape interval.
    """

    url: str
    selector: str = ""
    step: float = 60.0
    timeout: float = 20.0
    lag: float = 15.0

    def windows(self, start: float, end: float) -> list[Window]:
        """The whole windows between two Unix times, oldest first.

        Left out are those in which engines were scraped less than twice: what came then is not known. A restart
        within a window is counted as Prometheus does, from 0.

        Raises:
            WatchError: no answer in time, an error answer, or no such series.
        """
        count = int((end - self.lag - start) // self.step)
        if count < 1:
            return []
        return asyncio.run(self._windows(start, count))

    async def _windows(self, start: float, count: int) -> list[Window]:
        import aiohttp

        first, last = start + self.step, start + count * self.step
        each = f"{round(self.step * 1000)}ms"  # a duration is a whole number of a unit
        names = [REQUESTS, *(f"{name}_{part}" for name in (PROMPTS, OUTPUTS) for part in ("sum", "bucket"))]
        queries = [
            f"sum{' by (le)' if name.endswith('_bucket') else ''} (increase({name}{{{self.selector}}}[{each}]))"
            for name in names
        ]
        timeout = aiohttp.ClientTimeout(total=self.timeout)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            answers = [await self._range(session, query, first, last) for query in queries]
        found = dict(zip(names, answers, strict=True))
        for name, rows in found.items():
            if not rows:
                raise WatchError(
                    f"{self.shown}: no series {name}{{{self.selector}}} with two samples in {self.step:g}s; is vLLM "
                    "scraped there, and at least twice in a window?"
                )
        windows = (self._window(found, start + i * self.step, start + (i + 1) * self.step) for i in range(count))
        return [window for window in windows if window is not None]

    @property
    def shown(self) -> str:
        """The URL without user and password."""
        return re.sub(r"//[^/]*@", "//", self.url)  # up to the last @: a password may have one

    async def _range(self, session: Any, query: str, first: float, last: float) -> list[Mapping[str, Any]]:
        import aiohttp

        url, shown = (f"{base.rstrip('/')}/api/v1/query_range" for base in (self.url, self.shown))
        params = {"query": query, "start": f"{first:.3f}", "end": f"{last:.3f}", "step": f"{self.step:g}"}
        try:
            # A POST keeps long queries out of the URL, and is what the API documents for them.
            async with session.post(url, data=params) as response:
                body = await response.content.read(_LARGEST + 1)
                status = response.status
        except TimeoutError as error:
            raise WatchError(f"{shown}: no answer within {self.timeout:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            said = str(error).replace(url, shown) or type(error).__name__
            raise WatchError(f"{shown}: {said}") from error
        if len(body) > _LARGEST:
            raise WatchError(f"{shown}: an answer of more than {_LARGEST >> 20} MiB; ask for fewer or longer windows")
        try:
            answer = json.loads(body)
        except ValueError as error:
            raise WatchError(f"{shown}: HTTP {status} and no JSON; is this a Prometheus server?") from error
        if not isinstance(answer, dict) or answer.get("status") != "success":
            kind, text = (answer.get(key, "") if isinstance(answer, dict) else "" for key in ("errorType", "error"))
            raise WatchError(f"{shown}: HTTP {status}, {kind or 'no success'}: {text or 'no reason given'} ({query})")
        data = answer.get("data")
        if not isinstance(data, dict) or data.get("resultType") != "matrix" or not isinstance(data.get("result"), list):
            raise WatchError(f"{shown}: a matrix is expected, found {data!r:.80}")
        return list(data["result"])

    def _window(self, found: Mapping[str, list[Mapping[str, Any]]], start: float, end: float) -> Window | None:
        def values_of(row: Mapping[str, Any]) -> list[float]:
            try:
                return [float(value) for time, value in row["values"] if abs(float(time) - end) < self.step / 2]
            except (KeyError, TypeError, ValueError) as error:
                raise WatchError(f"{self.shown}: a row that is no series of numbers: {row!r:.80}") from error

        def at(row: Mapping[str, Any]) -> float:
            values = values_of(row)
            return values[0] if values and math.isfinite(values[0]) else 0.0

        def histogram(name: str) -> Histogram:
            rows = found[f"{name}_bucket"]
            try:
                cumulative = sorted((float(row["metric"]["le"]), at(row)) for row in rows)
            except (KeyError, TypeError, ValueError) as error:
                raise WatchError(f"{self.shown}: a bucket of {name} without a bound") from error
            counts, before = [], 0.0
            for _, value in cumulative:
                # Extrapolation of each bucket on its own may leave a little less in a wider one.
                counts.append(max(0.0, value - before))
                before = max(before, value)
            return Histogram(tuple(bound for bound, _ in cumulative), tuple(counts), at(found[f"{name}_sum"][0]))

        if not values_of(found[REQUESTS][0]):
            return None
        return Window(start, end - start, at(found[REQUESTS][0]), histogram(PROMPTS), histogram(OUTPUTS))
