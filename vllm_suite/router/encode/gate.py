"""Admission to one encoder: so many encode tokens at a time, the rest waits in line."""

from __future__ import annotations

import asyncio
from collections import deque


class Gate:
    """First come, first served. Who is larger than the whole limit gets in alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inside = 0
        self._line: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, tokens: int, timeout_s: float) -> None:
        """Wait for room for `tokens`; `leave` gives it back. Raises TimeoutError."""
        if not self._line and self._fits(tokens):
            self._inside += tokens
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = (tokens, turn)
        self._line.append(place)
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except (asyncio.CancelledError, TimeoutError):
            if turn.done() and not turn.cancelled():
                self.leave(tokens)  # let in at the moment of giving up
            else:
                self._line.remove(place)
                self._let_in()  # a smaller one behind may fit
            raise

    def leave(self, tokens: int) -> None:
        """Undo one `enter`."""
        self._inside -= tokens
        self._let_in()

    def _fits(self, tokens: int) -> bool:
        return self._inside == 0 or self._inside + tokens <= self._limit

    def _let_in(self) -> None:
        while self._line and self._fits(self._line[0][0]):
            tokens, turn = self._line.popleft()
            if not turn.done():
                self._inside += tokens
                turn.set_result(None)
