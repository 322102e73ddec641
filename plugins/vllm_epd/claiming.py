"""Who has an item: the producer that a reference names, or the first of several that may be making it."""

from __future__ import annotations

import asyncio
import time

from vllm_epd.messages import Fetch
from vllm_epd.peers import Peer, Peers
from vllm_suite.encoded import Granted, Where
from vllm_suite.handoff import Refusal

# An item that is being made is asked for in turns of this length, so that a producer that stops is noticed.
WAIT_TURN_S = 2.0
# Shortest turn: a producer that says at once that it has nothing is not asked in a loop.
MIN_TURN_S = 0.1
# The next producer of a pending item is asked after this long, or as soon as one has failed.
HEDGE_S = 1.0

Claimed = tuple[Peer, Granted]


class Claims:
    """One rank's claims. In the loop's thread."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    async def claim(self, order: Fetch) -> Claimed | Refusal:
        """The grant of what an order asks for, and who gave it."""
        if order.ref is not None:
            ref = order.ref
            peer = self._peers.at(Where(ref.producer, ref.epoch, ref.claim_host, ref.claim_port))
            granted = await peer.claim(order.identifier, ref, order.rows, 0.0)
            return granted if isinstance(granted, Refusal) else (peer, granted)
        assert order.pending is not None
        return await self._first_to_have_it(order, list(order.pending.candidates))

    async def _first_to_have_it(self, order: Fetch, places: list[Where]) -> Claimed | Refusal:
        until = time.monotonic() + order.wait_s
        asking: set[asyncio.Task[Claimed | Refusal]] = set()
        last = Refusal.UNKNOWN
        try:
            while places or asking:
                if places:
                    peer = self._peers.at(places.pop(0))
                    asking.add(asyncio.create_task(self._wait_at(peer, order, until)))
                done, asking = await asyncio.wait(
                    asking, timeout=HEDGE_S if places else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    answer = task.result()
                    if not isinstance(answer, Refusal):
                        asking |= done - {task}
                        return answer
                    last = answer
            return last
        finally:
            for task in asking:
                if not task.cancel() and not task.cancelled() and task.exception() is None:
                    _end_claim(task.result())  # another one was faster, or nobody waits any more

    async def _wait_at(self, peer: Peer, order: Fetch, until: float) -> Claimed | Refusal:
        while True:
            turn = min(WAIT_TURN_S, until - time.monotonic())
            if turn <= 0:
                return Refusal.CLAIM_TIMEOUT
            asked = time.monotonic()
            answer = await peer.claim(order.identifier, None, order.rows, turn)
            if not isinstance(answer, Refusal):
                return peer, answer
            if answer is not Refusal.UNKNOWN:
                return answer
            await asyncio.sleep(max(0.0, min(MIN_TURN_S, turn) - (time.monotonic() - asked)))


def _end_claim(answer: Claimed | Refusal) -> None:
    if not isinstance(answer, Refusal):
        peer, granted = answer
        peer.release(granted, ok=True)
