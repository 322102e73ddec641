"""A request inside an instance that can still go back to the router: nothing of its answer has left.

To vLLM's server the client leaves, so it ends the request; what it answers after that goes nowhere, and nothing of vLLM
has to be touched. The head of an answer waits for the first byte of its body: a stream's head leaves vLLM while the
request is still queued, and the router waits for that byte all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from vllm_suite.roles.state import Stage

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_LEFT = {"type": "http.disconnect"}


class Visit:
    """One request from its arrival to the end of its answer. Runs on one event loop.

    Args:
        name: its `X-Request-Id`.
        receive, send: of the server.

    Attributes:
        given_back: nothing more of it is answered.
    """

    def __init__(self, name: str, stage: Stage, receive: Receive, send: Send) -> None:
        self.name = name
        self.stage = stage
        self.given_back = False
        self._receive = receive
        self._send = send
        self._told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._read = False
        self._head: Message | None = None
        self._answered = False

    @property
    def open(self) -> bool:
        """Whether it is here with all of its body and nothing of its answer has left."""
        return self._read and not self._answered and not self.given_back

    def give_back(self) -> bool:
        """End it here. False where it is too late for that."""
        if not self.open:
            return False
        self.given_back = True
        if not self._told.done():
            self._told.set_result(None)
        return True

    async def receive(self) -> Message:
        """For the application: the client's messages, and that it has left once the request is given back."""
        if not self._read:
            message = await self._receive()
            self._read = not message.get("more_body")
            return message
        if self.given_back:
            return _LEFT
        asked = asyncio.ensure_future(self._receive())
        try:
            await asyncio.wait((asked, self._told), return_when=asyncio.FIRST_COMPLETED)
            return asked.result() if asked.done() else _LEFT
        finally:
            asked.cancel()

    async def send(self, message: Message) -> None:
        """For the application: pass on what it answers, the head with the first byte of the body."""
        if self.given_back:
            return
        if message["type"] == "http.response.start":
            self._head = message
            return
        if self._head is not None:
            if message["type"] == "http.response.body" and not message.get("body") and message.get("more_body"):
                return
            head, self._head = self._head, None
            self._answered = True
            await self._send(head)
        await self._send(message)
