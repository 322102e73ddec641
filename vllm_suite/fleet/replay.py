"""Replays prompts against an OpenAI server at their arrival times, streaming, and measures each answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_suite.fleet.prompts import Prompt

if TYPE_CHECKING:
    import aiohttp

_REQUEST_S = 120.0
_SILENCE_S = 60.0


@dataclass(frozen=True)
class Settings:
    """How every request of a replay is sent.

    `max_tokens` is one number for all: a trace's own output lengths would tell the scheduler what it cannot
    know. End-of-sequence is ignored, so every answer has that length. One request in `chat_every` goes out as
    a chat with text, the rest as token ids; 0 sends no chat.
    """

    model: str
    max_tokens: int
    chat_every: int = 8


@dataclass(frozen=True)
class Answer:
    """What came back. Times are in milliseconds from sending; `tpot_ms` is the mean gap after the first token.

    `error` is set where the request failed; the rest is then what came before.
    """

    index: int
    prompt_tokens: int
    token_ids: tuple[int, ...]
    ttft_ms: float | None
    tpot_ms: float | None
    error: str | None = None


@dataclass(frozen=True)
class Request:
    """One prepared request: when to send it, in seconds after the start, and what; `body` asks for a stream."""

    index: int
    arrival_s: float
    path: str
    body: Mapping[str, Any]


def prepared(prompts: Sequence[Prompt], settings: Settings) -> list[Request]:
    """The prompts as requests."""
    return [Request(prompt.index, prompt.arrival_s, *request(prompt, settings)) for prompt in prompts]


async def replay(
    base_url: str,
    prompts: Sequence[Prompt],
    settings: Settings,
    *,
    key: str | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Send every prompt at its time and wait for all answers; as `send`."""
    return await send(base_url, prepared(prompts, settings), settings.max_tokens, key=key, on_done=on_done)


async def send(
    base_url: str,
    requests: Sequence[Request],
    max_tokens: int,
    *,
    key: str | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Send every request at its time and wait for all answers; no request outlives two minutes.

    An answer that has not `max_tokens` tokens has failed. `on_done` is called with the number of answers so far.
    """
    import aiohttp

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=_REQUEST_S, sock_read=_SILENCE_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(base_url, headers=headers, timeout=timeout, connector=connector) as session:
        start = time.monotonic()
        answers: list[Answer] = []

        async def one(each: Request) -> None:
            await asyncio.sleep(start + each.arrival_s - time.monotonic())
            answers.append(await ask(session, each, max_tokens))
            if on_done is not None:
                on_done(len(answers))

        async with asyncio.TaskGroup() as group:
            for each in requests:
                group.create_task(one(each))
    return sorted(answers, key=lambda answer: answer.index)


async def ask(session: aiohttp.ClientSession, each: Request, max_tokens: int) -> Answer:
    """Send one request and read its stream."""
    import aiohttp

    stream = _Stream()
    error: str | None = None
    began = time.perf_counter()
    try:
        async with session.post(each.path, json=each.body) as response:
            if response.status == 200:
                await stream.read(response.content.readline, began)
            else:
                error = f"HTTP {response.status}: {(await response.text())[:300]}"
    except (aiohttp.ClientError, TimeoutError, ValueError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    if error is None and len(stream.token_ids) != max_tokens:
        error = f"the answer ended after {len(stream.token_ids)} of {max_tokens} tokens"
    gaps = len(stream.token_ids) - stream.first_tokens
    tpot = (stream.last_ms - stream.first_ms) / gaps if gaps > 0 else None
    return Answer(
        index=each.index,
        prompt_tokens=stream.prompt_tokens,
        token_ids=tuple(stream.token_ids),
        ttft_ms=stream.first_ms if stream.token_ids else None,
        tpot_ms=tpot,
        error=error,
    )


def greedy(model: str) -> dict[str, Any]:
    """What every request of a comparison has in its body: greedy, streamed, of fixed length, token ids back."""
    return {"model": model, "temperature": 0, "stream": True, "ignore_eos": True, "return_token_ids": True}


def request(prompt: Prompt, settings: Settings) -> tuple[str, dict[str, Any]]:
    """Path and body of a prompt's request."""
    body = greedy(settings.model)
    if settings.chat_every and prompt.index % settings.chat_every == settings.chat_every - 1:
        # A word and its space are five bytes at most, so the text has no more tokens than the prompt has ids.
        words = prompt.token_ids[: max(1, len(prompt.token_ids) // 5)]
        text = " ".join(_WORDS[token % len(_WORDS)] for token in words)
        messages = [{"role": "user", "content": text}]
        return "/v1/chat/completions", {
            **body, "messages": messages, "max_completion_tokens": settings.max_tokens,
        }  # fmt: skip
    return "/v1/completions", {**body, "prompt": list(prompt.token_ids), "max_tokens": settings.max_tokens}


_WORDS = ("a", "be", "cat", "dog", "even", "far", "good", "hat", "in", "jar", "key", "low", "man", "no", "of", "put")


class _Stream:
    """Reads server-sent events of a completion or a chat."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.prompt_tokens = 0
        self.first_tokens = 0
        self.first_ms = 0.0
        self.last_ms = 0.0

    async def read(self, readline: Callable[[], Awaitable[bytes]], began: float) -> None:
        """Until [DONE] or the end. Raises ValueError for an error event or a line that is not one."""
        while line := await readline():
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise ValueError(f"error event: {str(event['error'])[:300]}")
            prompt = event.get("prompt_token_ids")
            for choice in event.get("choices", []):
                prompt = prompt or choice.get("prompt_token_ids")
                fresh = choice.get("token_ids") or []
                if fresh:
                    self.last_ms = (time.perf_counter() - began) * 1000
                    if not self.token_ids:
                        self.first_ms, self.first_tokens = self.last_ms, len(fresh)
                    self.token_ids += fresh
            if prompt:
                self.prompt_tokens = len(prompt)
        raise ValueError("the stream ended without [DONE]")
