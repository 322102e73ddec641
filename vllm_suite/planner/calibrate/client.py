"""Asks a served engine for streams of token ids and notes when each token came."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import aiohttp

_REQUEST_S = 300.0


class ServedError(RuntimeError):
    """A request that was to be timed failed."""


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        prompt: token ids.
        most: `max_tokens`.
        arrival: seconds after the start at which it is sent.
        to_the_end: whether it runs up to `most`, and end-of-sequence is ignored.
    """

    prompt: tuple[int, ...]
    most: int
    arrival: float = 0.0
    to_the_end: bool = True


@dataclass
class Timed:
    """What came back: seconds after the request was due at which tokens came, one entry per token."""

    prompt: int
    sent: float = 0.0
    at: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.at[0]

    @property
    def tpot(self) -> float:
        """Mean gap between tokens in seconds; 0 for one token."""
        return (self.at[-1] - self.at[0]) / (len(self.at) - 1) if len(self.at) > 1 else 0.0

    @property
    def longest_gap(self) -> float:
        """Seconds; 0 for one token."""
        return max((b - a for a, b in zip(self.at, self.at[1:], strict=False)), default=0.0)


class Client:
    """A session with one server. An asynchronous context manager."""

    def __init__(self, url: str, model: str, key: str | None = None) -> None:
        self.url, self.model, self._key = url, model, key
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        import aiohttp

        self._session = aiohttp.ClientSession(
            self.url,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=aiohttp.ClientTimeout(total=_REQUEST_S),
            connector=aiohttp.TCPConnector(limit=0),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def send(self, asks: Sequence[Ask]) -> list[Timed]:
        """Each at its time; all answers. Raises ServedError for the first that failed."""
        start = time.perf_counter()
        return await asyncio.gather(*(self._one(each, start) for each in asks))

    async def _one(self, ask: Ask, start: float) -> Timed:
        assert self._session is not None
        body: dict[str, Any] = {
            "model": self.model, "prompt": list(ask.prompt), "max_tokens": ask.most, "temperature": 0,
            "stream": True, "return_token_ids": True, "ignore_eos": ask.to_the_end,
        }  # fmt: skip
        data = json.dumps(body).encode()
        wait = start + ask.arrival - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        due = start + ask.arrival
        found = Timed(len(ask.prompt), time.perf_counter() - due)
        headers = {"Content-Type": "application/json"}
        async with self._session.post("/v1/completions", data=data, headers=headers) as response:
            if response.status != 200:
                raise ServedError(f"{self.url}: HTTP {response.status}: {(await response.text())[:300]}")
            while line := await response.content.readline():
                if not line.startswith(b"data: {"):
                    continue
                now = time.perf_counter() - due
                event = json.loads(line[6:])
                if "error" in event:
                    raise ServedError(f"{self.url}: {str(event['error'])[:300]}")
                for choice in event["choices"]:
                    found.at += [now] * len(choice.get("token_ids") or ())
        if not found.at or (ask.to_the_end and len(found.at) != ask.most):
            raise ServedError(f"{self.url}: {len(found.at)} tokens of {ask.most} came")
        return found
