"""Scripted encoders, what they are sent and what they answer, and media to send them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import struct
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web
from scripted import Instance

from vllm_suite.encoded import (
    Challenge,
    Hello,
    Kept,
    Probe,
    Producer,
    Refused,
    Slice,
    Welcome,
    hello_mac,
    read_frame,
    request_decoder,
    slice_identifier,
)
from vllm_suite.frames import BadMessage, frame
from vllm_suite.handoff import digest, fleet_key

CONSUMER = {"host": "", "port": 0, "role": "ec_consumer"}
ROWS = 64
UNITS = 16


@dataclass
class Encoder(Instance):
    """Encodes as told. Beside `Instance`'s words its script knows:

    no_params (no ec_transfer_params) · no_item (the first item has no entry) · not_kept (the first item has a
    suite_error) · foreign (references of another producer) · unsigned · other_content · odd (identifiers of its
    own) · bare (metadata missing) · bad_grid · half (a head, and then nothing) · uncut (whole items in the place of
    slices) · unsaid (slices that are not said to be slices) · short (slices without their last row).

    ``slices`` are the modalities of which it makes slices; an item has `ROWS` rows in `UNITS` units.

    `broken` are identities whose requests it refuses with 400, as vLLM does where one of several images is corrupt.
    """

    ec_role: str = "ec_producer"
    metadata: dict[str, Any] = field(default_factory=lambda: {"image_grid_thw": [1, 8, 8]})
    broken: set[str] = field(default_factory=set)
    kept: dict[str, int] = field(default_factory=dict)
    probes: list[tuple[str, ...]] = field(default_factory=list)
    slices: tuple[str, ...] = ()
    probe_mode: str = "ok"  # ok · silent · junk · close · none
    connections: int = 0

    async def start(self) -> Encoder:
        self._channels: set[asyncio.StreamWriter] = set()
        self._server = await asyncio.start_server(self._channel, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.ec = {"host": host, "port": port, "role": self.ec_role, "slices": list(self.slices)}
        await super().start()
        return self

    async def stop(self) -> None:
        self._server.close()
        for writer in self._channels:
            writer.close()
        await super().stop()

    @property
    def calls(self) -> list[list[str]]:
        """The identities in each call, in order of arrival."""
        return [identities(seen.body) for seen in self.seen]

    @property
    def facts(self) -> Producer:
        assert self.ec is not None
        return Producer(self.instance_id, self.epoch, digest("m"), digest("l"), self.ec["host"], self.ec["port"])

    def reference(self, identifier: str, rows: int = ROWS, **over: Any) -> dict[str, Any]:
        ref = self.facts.reference(identifier, f"item-{len(self.kept)}", rows, 30.0, over.pop("key", fleet_key()))
        return {**ref.to_json(), **over}

    async def _answer(self, request: web.Request, body: Any, word: str) -> web.StreamResponse:
        encoding = isinstance(body, dict) and (body.get("ec_transfer_params") or {}).get("suite_encode_only")
        if not encoding:
            return await super()._answer(request, body, word)
        names = identities(body)
        if self.broken.intersection(names):
            error = {"message": "Failed to load image: cannot identify image file", "type": "BadRequestError"}
            return web.json_response({"error": {**error, "param": None, "code": 400}}, status=400)
        if word in ("ok", "slow") or word not in WORDS:
            plain = await super()._answer(request, body, word)
            if word not in ("ok", "slow"):
                return plain
        if word == "half":
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            await response.prepare(request)
            await response.write(b"{")
            await asyncio.sleep(30)
        if word == "no_params":
            return web.json_response({"choices": [], "ec_transfer_params": None})
        entries: dict[str, Any] = {}
        pieces = msgspec.convert(body["ec_transfer_params"].get("suite_slices", {}), dict[str, Slice])
        for index, name in enumerate(names):
            rows = ROWS
            if (piece := pieces.get(name)) is not None:
                assert name == slice_identifier(piece.of, piece.index, piece.count)
                if word == "uncut":
                    name = piece.of
                else:
                    start, stop = piece.bounds(UNITS)
                    rows = (stop - start) * ROWS // UNITS - (word == "short")
            identifier = digest("odd", name) if word == "odd" else name
            entry: dict[str, Any] = {"item_indices": [index], "metadata": dict(self.metadata)}
            if word == "bare":
                entry["metadata"] = {}
            if word == "bad_grid":
                entry["metadata"] = {"image_grid_thw": [1.0, 8, 8]}
            if piece is not None and name != piece.of and word != "unsaid":
                entry |= {"metadata": {}, "suite_slice": {**msgspec.structs.asdict(piece), "rows": ROWS}}
            if index == 0 and word == "no_item":
                continue
            if index == 0 and word == "not_kept":
                entries[identifier] = {**entry, "suite_error": "no_room"}
                continue
            over = {"producer": "someone"} if word == "foreign" else {}
            if word == "other_content":
                over = {"content": digest("else")}
            if word == "unsigned":
                over = {"mac": ""}
            entry["suite"] = self.reference(identifier, rows, **over)
            self.kept[identifier] = rows
            entries[identifier] = entry
        answer = {"choices": [{"index": 0, "message": {"content": ""}, "finish_reason": "stop"}]}
        return web.json_response({**answer, "ec_transfer_params": entries})

    async def _channel(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._channels.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, BadMessage, OSError):
            nonce = os.urandom(16)
            writer.write(frame(Challenge(nonce)))
            hello = await read_frame(reader, request_decoder)
            assert isinstance(hello, Hello)
            facts = self.facts
            if hello.mac != hello_mac(fleet_key(), nonce, hello.name):
                writer.write(frame(Refused(hello.seq, "bad_signature")))
                writer.close()
                return
            writer.write(
                frame(Welcome(hello.seq, facts.producer, facts.epoch, facts.model, facts.layout, "agent", b""))
            )
            while True:
                probe = await read_frame(reader, request_decoder)
                assert isinstance(probe, Probe)
                self.probes.append(probe.identifiers)
                if self.probe_mode == "silent":
                    continue
                if self.probe_mode == "junk":
                    writer.write(b"\x00\x00\x00\x02hi")
                    continue
                if self.probe_mode == "close":
                    writer.close()
                    return
                kept = {} if self.probe_mode == "none" else self.kept
                refs = {
                    name: self.facts.reference(name, "item-0", kept[name], probe.hold_s, fleet_key())
                    for name in probe.identifiers
                    if name in kept
                }
                writer.write(frame(Kept(probe.seq, refs)))


WORDS = frozenset(
    ["no_params", "no_item", "not_kept", "foreign", "unsigned", "other_content", "odd", "bare", "bad_grid", "half"],
) | {"uncut", "unsaid", "short"}


def parts_of(body: Any) -> list[dict[str, Any]]:
    """Every content part that is no text, in order."""
    found = []
    for message in body["messages"]:
        content = message["content"]
        found += [part for part in content if part["type"] != "text"] if isinstance(content, list) else []
    return found


def identities(body: Any) -> list[str]:
    return [part["uuid"] for part in parts_of(body)]


def kinds(body: Any) -> Counter[str]:
    return Counter(part["type"] for part in parts_of(body))


async def fleet(
    instance: Any, encoder: Any, serve: Any, encoders: int = 2, settings: dict[str, Any] | None = None, **kwargs: Any
) -> tuple[list[Encoder], Instance, Instance, Any]:
    """Encoders, a prefill, a decode, and a router; `kwargs` are the encoders'."""
    es = [await encoder(**kwargs) for _ in range(encoders)]
    p, d = await instance("prefill", ec=CONSUMER), await instance("decode", ec=CONSUMER)
    router = await serve(
        [*es, p, d],
        encode={"overlap": "never", **(settings or {})},
        # Without a history decode is never thought to hold a prompt already.
        disaggregation={"history_chunks": 0},
        # Nobody is forgotten because the machine is busy; who has died refuses the connection.
        membership={"poll_timeout_s": 2.0, "forget_after_s": 10.0},
    )
    return es, p, d, router


# Media


def png(width: int = 64, height: int = 64, seed: int = 0) -> bytes:
    """A PNG of one colour; the declared size need not be true to be read from its header."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    small = min(width * height, 4096)
    pixels = zlib.compress(bytes([seed % 251]) * (small * 3))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"tEXt", b"seed\0%d" % seed) + chunk(b"IDAT", pixels)


def wav(seconds: float = 1.0, seed: int = 0) -> bytes:
    """8 kHz, one channel, 16 bits."""
    data = bytes([seed % 256]) * (int(8000 * seconds) * 2)
    form = struct.pack("<HHIIHH", 1, 1, 8000, 16000, 2, 16)
    size = struct.pack("<I", len(data) + 36)
    return b"RIFF" + size + b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(data)) + data


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def image(width: int = 64, height: int = 64, seed: int = 0, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(png(width, height, seed))}, **more}


def sound(seconds: float = 1.0, seed: int = 0) -> dict[str, Any]:
    data = base64.b64encode(wav(seconds, seed)).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def film(seed: int = 0) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_url(b"film%d" % seed, "video/mp4")}}


def chat(*parts: dict[str, Any], text: str = "what is this? " * 20, **more: Any) -> dict[str, Any]:
    """A request with these parts before a text long enough to be prefilled elsewhere."""
    content = [*parts, {"type": "text", "text": text}]
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 4, **more}
