"""Reads a granted item into the receive pool, and verifies what has arrived."""

from __future__ import annotations

import asyncio
import logging
import time

from vllm_epd.agent import Agent, TransferError
from vllm_epd.checksum import checksum, finite
from vllm_epd.config import EpdConfig
from vllm_epd.messages import Fetch
from vllm_epd.peers import Peer
from vllm_epd.pool import DTYPES
from vllm_epd.room import Region, Room
from vllm_suite.encoded import Granted
from vllm_suite.handoff import Refusal

logger = logging.getLogger("vllm.suite.epd")

FIRST_POLL_S, LAST_POLL_S = 0.0002, 0.002


class Reader:
    """One rank's reads. In the loop's thread.

    Args:
        dtype: torch's name of the model's type without the prefix.
    """

    def __init__(self, config: EpdConfig, agent: Agent, room: Room, dtype: str) -> None:
        self._config = config
        self._agent = agent
        self._dtype = dtype
        self._itemsize = DTYPES[dtype].itemsize
        self._room = room

    async def bring(
        self, order: Fetch, peer: Peer, granted: Granted, region: Region, whole: Region | None = None
    ) -> Refusal | None:
        """Read and verify a granted item, and end its claim. ``whole``: the place that ``region`` is a part of."""
        refusal: Refusal | None = Refusal.READ_FAILED
        given_up = False
        try:
            refusal = self._unlike(order, granted) or await self._read(peer, granted, region, whole or region)
            refusal = refusal or self._unsound(granted, region)
            return refusal
        except asyncio.CancelledError:
            given_up = True
            raise
        finally:
            peer.release(granted, ok=refusal is None)
            if refusal is Refusal.READ_FAILED and not (given_up and self._agent.knows(peer.remote)):
                peer.reset()

    def _unlike(self, order: Fetch, granted: Granted) -> Refusal | None:
        """Why what is offered is not what the model needs."""
        if granted.rows < order.rows:
            return Refusal.TRUNCATED
        size = order.rows * order.width * self._itemsize
        shape = (granted.rows, granted.width, granted.dtype) == (order.rows, order.width, self._dtype)
        if not shape or granted.memory not in ("DRAM", "VRAM"):
            return Refusal.WRONG_SHAPE
        if granted.size != size or sum(part for _, part in granted.runs) != size:
            return Refusal.TRUNCATED if granted.size < size else Refusal.WRONG_SHAPE
        return None

    async def _read(self, peer: Peer, granted: Granted, region: Region, whole: Region) -> Refusal | None:
        deadline = time.monotonic() + min(self._config.read_timeout_s, granted.hold_s)
        local = self._room.addresses(region)
        peer.reads += 1
        read = None
        try:
            read = self._agent.read(
                peer.remote, local, granted.runs, granted.memory, device=granted.device,
                local_memory=self._room.memory, local_device=self._room.device,
            )  # fmt: skip
            pause = FIRST_POLL_S
            while read.poll() == "reading" and time.monotonic() < deadline:
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, LAST_POLL_S)
            if read.state == "done":
                return None
            logger.warning("epd: reading from %s: %s", peer.place.producer, read.error or "deadline passed")
        except TransferError as error:
            logger.warning("epd: reading from %s: %s", peer.place.producer, error)
        finally:
            if read is not None and read.state != "done" and not read.cancel():
                self._room.keep_away(read, whole)
            peer.read_ended()
        return Refusal.READ_FAILED

    def _unsound(self, granted: Granted, region: Region) -> Refusal | None:
        data = self._room.read(region)
        if self._config.verify_checksum and checksum(data, granted.seed) != granted.checksum:
            return Refusal.BAD_CHECKSUM
        if self._config.verify_finite and not finite(data.view(DTYPES[self._dtype])):
            return Refusal.NON_FINITE
        return None
