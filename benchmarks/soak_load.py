"""The load of a soak whose every answer is known beforehand, and what may become of a request."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

from vllm_suite.fleet.replay import greedy

Outcome = Literal["right", "error", "left", "refused", "wrong", "stuck", "unclear"]
"""How a request ended.

right: the answer of one engine, token by token. error: no answer, and the client was told so; tokens that came before
it were right. left: the client went away, what it had got was right. refused: a malformed request got its 4xx. The
others are failures: wrong tokens; no end within the deadline; an end that tells the client nothing.
"""
GOOD = ("right", "error", "left", "refused")
MODEL = "tiny"
_LEAVES, _MALFORMED = 0.10, 0.12


@dataclass(frozen=True)
class Question:
    """A request and the tokens that one engine answers."""

    path: str
    body: dict[str, Any]
    expected: tuple[int, ...] = ()


@dataclass
class Record:
    """What became of one request. Times are seconds since the start of the load."""

    client: int
    number: int
    kind: str
    began_s: float
    ended_s: float
    outcome: Outcome
    detail: str = ""


@dataclass
class Tally:
    """All records, and counts by kind and outcome."""

    records: list[Record] = field(default_factory=list)

    def counts(self) -> dict[str, dict[str, int]]:
        """Requests by kind, then by outcome."""
        found: dict[str, dict[str, int]] = {}
        for record in self.records:
            row = found.setdefault(record.kind, {})
            row[record.outcome] = row.get(record.outcome, 0) + 1
        return found

    def failures(self) -> list[Record]:
        """Those that must not be."""
        return [record for record in self.records if record.outcome not in GOOD]


def questions(seed: int, count: int, longest: int = 1200, most_tokens: int = 160) -> list[Question]:
    """Prompts of all lengths, a quarter of them chats. Greedy, of fixed length, token ids in the answer."""
    rng = random.Random(f"questions {seed}")
    found: list[Question] = []
    for index in range(count):
        size = int(4 * (longest / 4) ** rng.random())
        body = greedy(MODEL) | {"stream": False}
        tokens = int(4 * (most_tokens / 4) ** rng.random())
        if index % 4 == 3:
            text = " ".join(
                rng.choice(("a", "cat", "dog", "good", "hat", "key", "man", "put")) for _ in range(size // 5)
            )
            body |= {"messages": [{"role": "user", "content": text or "a"}], "max_completion_tokens": tokens}
            found.append(Question("/v1/chat/completions", body))
        else:
            body |= {"prompt": [rng.randrange(16, 500) for _ in range(size)], "max_tokens": tokens}
            found.append(Question("/v1/completions", body))
    return found


MALFORMED: dict[str, tuple[str, str, bytes, dict[str, str]]] = {
    "no JSON": ("POST", "/v1/completions", b'{"model": "tiny", "prompt": ', {}),
    "no object": ("POST", "/v1/completions", b"[1, 2]", {}),
    "no bytes": ("POST", "/v1/chat/completions", b"", {}),
    "no UTF-8": ("POST", "/v1/completions", b'{"model": "tiny", "prompt": "\xff\xfe"}', {}),
    "no prompt": ("POST", "/v1/completions", b'{"model": "tiny"}', {}),
    "other model": ("POST", "/v1/completions", b'{"model": "other", "prompt": "a"}', {}),
    "wrong type": ("POST", "/v1/completions", b'{"model": "tiny", "prompt": "a", "max_tokens": "many"}', {}),
    "negative": ("POST", "/v1/completions", b'{"model": "tiny", "prompt": "a", "max_tokens": -4}', {}),
    "token that is none": ("POST", "/v1/completions", b'{"model": "tiny", "prompt": [1, 99999999]}', {}),
    "too long": ("POST", "/v1/completions", b'{"model": "tiny", "prompt": [' + b"7," * 5000 + b"7]}", {}),
    "no messages": ("POST", "/v1/chat/completions", b'{"model": "tiny", "messages": 7}', {}),
    "picture for a text model": (
        "POST", "/v1/chat/completions",
        b'{"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": '
        b'{"url": "data:image/png;base64,AAAA"}}]}]}', {},
    ),
    "wrong key": ("POST", "/v1/completions", b'{"model": "tiny", "prompt": "a"}', {"Authorization": "Bearer no"}),
    "no such route": ("POST", "/v1/embeddings", b"{}", {}),
    "wrong method": ("GET", "/v1/completions", b"", {}),
    "long header": ("POST", "/v1/completions", b"{}", {"X-Long": "x" * 20_000}),
}  # fmt: skip


class Client:
    """One client that asks one question after the other. Equal seeds and numbers ask the same in the same order."""

    def __init__(
        self,
        number: int,
        seed: int,
        session: aiohttp.ClientSession,
        url: str,
        key: str,
        known: Sequence[Question],
        tally: Tally,
        deadline_s: float,
    ) -> None:
        self._number = number
        self._rng = random.Random(f"client {seed} {number}")
        self._session = session
        self._url = url
        self._headers = {"Authorization": f"Bearer {key}"}
        self._known = known
        self._tally = tally
        self._timeout = aiohttp.ClientTimeout(total=deadline_s, sock_connect=deadline_s)

    async def run(self, ends: asyncio.Event, began: float) -> None:
        """Until `ends` is set; the request that runs then is waited for."""
        turn = 0
        while not ends.is_set():
            at_s = time.monotonic() - began
            kind, outcome, detail = await self.turn()
            record = Record(
                self._number, turn, kind, round(at_s, 3), round(time.monotonic() - began, 3), outcome, detail
            )
            self._tally.records.append(record)
            turn += 1
            # One that is refused at once, while the router starts again, must not spin.
            await asyncio.sleep(0.25 if outcome == "error" else 0.02)

    async def turn(self) -> tuple[str, Outcome, str]:
        """One request: its kind, outcome and, where that is of interest, detail."""
        rng = self._rng
        draw, question = rng.random(), rng.choice(list(self._known))
        name, stream, after = rng.choice(list(MALFORMED)), rng.random() < 0.6, rng.randrange(1, 6)
        if draw < _MALFORMED:
            kind, asked = f"malformed: {name}", self._malformed(name)
        elif draw < _MALFORMED + _LEAVES:
            kind, asked = "leaves", self._stream(question, after)
        elif stream:
            kind, asked = "stream", self._stream(question, None)
        else:
            kind, asked = "whole", self._whole(question)
        try:
            return kind, *await asked
        except TimeoutError:
            return kind, "stuck", f"no end within {self._timeout.total} s: {json.dumps(question.body)[:200]}"
        except aiohttp.ClientError as error:
            # The router's own process ended: the connection says so.
            return kind, "error", f"connection: {type(error).__name__}: {error}"

    async def _whole(self, question: Question) -> tuple[Outcome, str]:
        url = self._url + question.path
        async with self._session.post(url, json=question.body, headers=self._headers, timeout=self._timeout) as answer:
            text = await answer.text()
            if answer.status != 200:
                return judge_refusal(answer.status, text, "error")
        try:
            tokens = json.loads(text)["choices"][0]["token_ids"]
        except (ValueError, LookupError, TypeError):
            return "unclear", f"200 with {text[:200]!r}"
        return compare(tokens, question.expected, complete=True)

    async def _stream(self, question: Question, leave_after: int | None) -> tuple[Outcome, str]:
        url, body = self._url + question.path, question.body | {"stream": True}
        tokens: list[int] = []
        events = 0
        async with self._session.post(url, json=body, headers=self._headers, timeout=self._timeout) as answer:
            if answer.status != 200:
                return judge_refusal(answer.status, await answer.text(), "error")
            try:
                async for line in answer.content:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return compare(tokens, question.expected, complete=True)
                    event = json.loads(data)
                    if "error" in event:
                        right, detail = compare(tokens, question.expected, complete=False)
                        return ("error", str(event["error"])[:300]) if right == "right" else (right, detail)
                    tokens += [token for choice in event["choices"] for token in choice.get("token_ids") or []]
                    events += 1
                    if events == leave_after:
                        right, detail = compare(tokens, question.expected, complete=False)
                        return ("left", "") if right == "right" else (right, detail)
            except (ValueError, LookupError, TypeError) as error:
                return "unclear", f"an event cannot be read: {error!r}"
            except aiohttp.ClientPayloadError as error:
                right, detail = compare(tokens, question.expected, complete=False)
                return ("error", f"cut off: {error}") if right == "right" else (right, detail)
        return "unclear", "the stream ended without [DONE] and without an error"

    async def _malformed(self, name: str) -> tuple[Outcome, str]:
        method, path, body, headers = MALFORMED[name]
        headers = {"Content-Type": "application/json"} | self._headers | headers
        async with self._session.request(
            method, self._url + path, data=body or None, headers=headers, timeout=self._timeout
        ) as answer:
            return judge_refusal(answer.status, await answer.text(), "refused")


def judge_refusal(status: int, text: str, wanted: Outcome) -> tuple[Outcome, str]:
    """An answer that is no 200: 4xx, and 5xx of a fleet in trouble, each with words in vLLM's shape.

    A 500 is an engine's own, in its words; that of an engine that has ended reaches a client as 503.
    """
    if status == 200:
        return "unclear", f"a malformed request was answered: {text[:200]}"
    if not text.strip():
        return "unclear", f"HTTP {status} without a word"
    if status in (429, 500, 502, 503, 504) and _message(text):
        return "error", f"HTTP {status}: {text[:200]}"
    if 400 <= status < 500 and wanted == "refused":
        return "refused", ""
    return "unclear", f"HTTP {status}: {text[:300]}"


def _message(text: str) -> str | None:
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        return None
    return message if isinstance(message, str) and message else None


def compare(tokens: Sequence[int], expected: Sequence[int], *, complete: bool) -> tuple[Outcome, str]:
    """Equal, or where the answer is not complete, equal so far."""
    wanted = tuple(expected) if complete else tuple(expected[: len(tokens)])
    if tuple(tokens) == wanted:
        return "right", ""
    return "wrong", f"{list(tokens)} in place of {list(wanted)}"
