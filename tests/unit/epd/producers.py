"""A producer for tests, in this process or in one of its own, and a consumer that speaks the item channel."""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from vllm_epd.agent import Agent, Read
from vllm_epd.checksum import checksum
from vllm_epd.item_server import Facts, ItemServer, Limits
from vllm_epd.pool import Pool, Stored
from vllm_epd.tiers import new_slab
from vllm_suite.encoded import (
    Answer,
    Challenge,
    Claim,
    Granted,
    Hello,
    Kept,
    Probe,
    Refused,
    Release,
    Welcome,
    answer_decoder,
    hello_mac,
    read_frame,
)
from vllm_suite.frames import frame
from vllm_suite.handoff import Handoff
from vllm_suite.loop_thread import LoopThread

FACTS = Facts("producer", "epoch", "model", "layout")
KEY = b"fleet key"
BLOCK = 4096
# Longest wait for anything that has to happen; far above what it takes.
SOON_S = 30.0


def picture(rows: int = 16, width: int = 64, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


class LocalProducer:
    """Pool, agent and server in this process."""

    def __init__(
        self, blocks: int = 64, lease_s: float = 30.0, key: bytes | None = KEY, facts: Facts = FACTS, **limits: Any
    ) -> None:
        self.thread = LoopThread("item-server-test")
        self.slab = new_slab(blocks * BLOCK)
        self.pool = Pool(self.slab, BLOCK, lease_s)
        self.agent = Agent(f"{facts.producer}-{time.monotonic_ns()}")
        self.agent.register(self.slab)
        self.key = key
        self.server = ItemServer(
            self.pool, self.agent, facts, key, "127.0.0.1", 0, self.thread, Limits(**limits) if limits else None
        )

    def put(self, identifier: str, tensor: torch.Tensor | None = None) -> Handoff:
        stored = self.pool.put(identifier, picture() if tensor is None else tensor)
        assert isinstance(stored, Stored), stored
        return self.server.facts.reference(identifier, stored.item_id, stored.rows, 30.0, self.key)

    def close(self) -> None:
        self.server.close()
        self.thread.stop()
        self.agent.close()


class Consumer:
    """One connection. Answers are kept by ``seq``, so that several claims may wait at once."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.seq = 0
        self.early: dict[int, Answer] = {}
        self.welcome: Welcome | None = None

    @classmethod
    async def connect(cls, port: int, key: bytes | None = KEY, name: str = "consumer") -> Consumer:
        consumer = cls(*await asyncio.open_connection("127.0.0.1", port))
        answer = await consumer.greet(key, name)
        assert isinstance(answer, Welcome), answer
        consumer.welcome = answer
        return consumer

    async def greet(self, key: bytes | None, name: str = "consumer") -> Answer:
        challenge = await self.next()
        assert isinstance(challenge, Challenge)
        self.seq += 1
        self.writer.write(frame(Hello(self.seq, name, hello_mac(key, challenge.nonce, name))))
        return await self.answer(self.seq)

    async def next(self) -> Answer:
        async with asyncio.timeout(SOON_S):
            return await read_frame(self.reader, answer_decoder)

    async def answer(self, seq: int) -> Any:
        while seq not in self.early:
            answer = await self.next()
            self.early[answer.seq if not isinstance(answer, Challenge) else -1] = answer
        return self.early.pop(seq)

    def begin_claim(self, identifier: str, ref: Handoff | None = None, **changes: Any) -> int:
        """Send a claim without waiting for its answer."""
        self.seq += 1
        fields: dict[str, Any] = {
            "seq": self.seq, "identifier": identifier, "ref": ref, "producer": FACTS.producer, "epoch": FACTS.epoch,
            "model": FACTS.model, "layout": FACTS.layout, "rows": 16, "wait_s": 0.0, "hold_s": 5.0,
        }  # fmt: skip
        self.writer.write(frame(Claim(**(fields | changes))))
        return self.seq

    async def claim(self, identifier: str, ref: Handoff | None = None, **changes: Any) -> Granted | str:
        """The grant, or the refusal's word."""
        answer = await self.answer(self.begin_claim(identifier, ref, **changes))
        assert isinstance(answer, Granted | Refused)
        return answer.refusal if isinstance(answer, Refused) else answer

    async def granted(self, identifier: str, ref: Handoff | None = None, **changes: Any) -> Granted:
        answer = await self.claim(identifier, ref, **changes)
        assert isinstance(answer, Granted), answer
        return answer

    async def release(self, claim: int, ok: bool = True) -> None:
        self.seq += 1
        self.writer.write(frame(Release(self.seq, claim, ok)))
        assert await self.answer(self.seq) == Kept(self.seq, {})

    async def probe(self, *identifiers: str, hold_s: float = 5.0) -> dict[str, Handoff]:
        self.seq += 1
        self.writer.write(frame(Probe(self.seq, identifiers, hold_s)))
        answer = await self.answer(self.seq)
        assert isinstance(answer, Kept)
        return answer.refs

    async def closed(self) -> bool:
        """The producer closes this connection soon."""
        try:
            async with asyncio.timeout(SOON_S):
                while await self.reader.read(65536):
                    pass
        except ConnectionError:
            pass
        return True

    def close(self) -> None:
        self.writer.close()


class Reader:
    """An agent with a place to read into."""

    def __init__(self, size: int = 1 << 20) -> None:
        self.buffer = new_slab(size)
        self.agent = Agent(f"reader-{time.monotonic_ns()}")
        self.agent.register(self.buffer)

    def begin(self, remote: str, granted: Granted, at: int = 0) -> Read:
        local = [(self.buffer.data_ptr() + at, granted.size)]
        return self.agent.read(remote, local, granted.runs, granted.memory, device=granted.device)

    async def read(self, remote: str, granted: Granted, at: int = 0) -> torch.Tensor:
        """The bytes of a granted item."""
        read = self.begin(remote, granted, at)
        async with asyncio.timeout(SOON_S):
            while read.poll() == "reading":
                await asyncio.sleep(0.001)
        assert read.state == "done", read.error
        return self.buffer[at : at + granted.size]

    def close(self) -> None:
        self.agent.close()


class ProducerProcess:
    """A `LocalProducer` in a process of its own, told what to do over its standard input."""

    def __init__(self, *arguments: str) -> None:
        root = Path(__file__).resolve().parents[3]
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "plugins")]), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.epd.producers", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # `select` sees what Python has not read yet, and nothing may hide in a buffer
            cwd=root,
            env=env,
        )
        self.port = int(self._line()["port"])

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        deadline = time.monotonic() + 2 * SOON_S
        while True:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the producer's process does not answer"
            line = self.process.stdout.readline()
            assert line, f"the producer's process ended with {self.process.wait(5)}"
            if line.startswith(b"{"):
                return dict(json.loads(line))

    def ask(self, *words: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(words).encode() + b"\n")
        self.process.stdin.flush()
        return self._line()

    def put(self, identifier: str, rows: int = 16, seed: int = 0) -> Handoff:
        return Handoff(**self.ask("put", identifier, str(rows), str(seed)))

    def cpu_ticks(self) -> int:
        """Processor time used so far by all threads, in the kernel's ticks."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def close(self) -> None:
        self.process.kill()
        self.process.wait(SOON_S)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def right(data: torch.Tensor, granted: Granted) -> bool:
    return checksum(data, granted.seed) == granted.checksum


def main(port: str = "0", epoch: str = FACTS.epoch) -> None:
    """The other process."""
    torch.set_num_threads(1)
    thread, slab = LoopThread("item-server"), new_slab(256 * BLOCK)
    pool, agent = Pool(slab, BLOCK, 30.0), Agent(f"producer-{os.getpid()}")
    agent.register(slab)
    server = ItemServer(pool, agent, FACTS._replace(epoch=epoch), KEY, "127.0.0.1", int(port), thread)
    print(json.dumps({"port": server.port}), flush=True)
    for line in sys.stdin:
        word, *rest = line.split()
        answer: dict[str, Any] = {}
        if word == "put":
            identifier, rows, seed = rest[0], int(rest[1]), int(rest[2])
            stored = pool.put(identifier, picture(rows, seed=seed))
            assert isinstance(stored, Stored)
            answer = server.facts.reference(identifier, stored.item_id, rows, 30.0, KEY).to_json()
        elif word == "tamper":
            stored = pool.get(rest[0])
            assert stored is not None
            slab[stored.runs[0][0] + int(rest[1])] ^= 1
        elif word == "has":
            answer = {"has": pool.contains(rest[0])}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not happened():
            await asyncio.sleep(0.005)


def changed(ref: Handoff, key: bytes | None = KEY, **fields: object) -> Handoff:
    """``ref`` with other fields, signed by somebody who knows the key."""
    return msgspec.structs.replace(ref, **fields).signed(key)
