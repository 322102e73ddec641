"""What media headers declare, read without decoding: the pixels of an image, the seconds of a WAV file.

Sizes go into the cost of an item and are held against the pixel limit before any decoder sees the file.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vllm_suite.router.encode.config import Modality
from vllm_suite.router.encode.refusal import BadMedia


class Measure(NamedTuple):
    """`amount` of `unit`: pixels, seconds, or bytes where the format is not known here."""

    unit: str
    amount: float


def measure(head: bytes, size: int, modality: Modality, max_pixels: int) -> Measure:
    """The measure of an item.

    Args:
        head: its first bytes, all of them where `size` is small.
        size: bytes in all.

    Raises:
        BadMedia: an image of no or too many pixels, or one whose header cannot be read though its format is known.
    """
    if modality == "image":
        sides = _sides(head, size)
        if sides is None:
            return Measure("bytes", float(size))
        width, height = sides
        if width <= 0 or height <= 0:
            raise BadMedia(400, "no_pixels", f"an image of {width} x {height} pixels")
        if width * height > max_pixels:
            raise BadMedia(400, "too_many_pixels", f"{width} x {height} pixels; the limit is {max_pixels} in all")
        return Measure("pixels", float(width * height))
    if modality == "audio":
        rate = _wav_rate(head)
        if rate:
            return Measure("seconds", size / rate)
    return Measure("bytes", float(size))


def _broken(what: str) -> BadMedia:
    return BadMedia(400, "broken", f"the {what} header cannot be read")


def _sides(head: bytes, size: int) -> tuple[int, int] | None:
    """Width and height; None for a format that is not known here."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        if len(head) < 24 or head[12:16] != b"IHDR":
            raise _broken("PNG")
        width, height = struct.unpack_from(">II", head, 16)
        return width, height
    if head[:6] in (b"GIF87a", b"GIF89a"):
        if len(head) < 10:
            raise _broken("GIF")
        width, height = struct.unpack_from("<HH", head, 6)
        return width, height
    if head.startswith(b"\xff\xd8"):
        return _jpeg(head, size)
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return _webp(head)
    if head.startswith(b"BM") and len(head) >= 26 and struct.unpack_from("<I", head, 14)[0] >= 40:
        width, height = struct.unpack_from("<ii", head, 18)
        return abs(width), abs(height)
    return None


_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})


def _jpeg(head: bytes, size: int) -> tuple[int, int] | None:
    at = 2
    while at + 4 <= len(head):
        if head[at] != 0xFF:
            raise _broken("JPEG")
        marker = head[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in _ALONE:
            at += 2
            continue
        if marker in (0xD9, 0xDA):  # end, or pixels before any frame
            raise _broken("JPEG")
        (length,) = struct.unpack_from(">H", head, at + 2)
        if length < 2:
            raise _broken("JPEG")
        if marker in _START_OF_FRAME:
            if at + 9 > len(head):
                break
            height, width = struct.unpack_from(">HH", head, at + 5)
            return width, height
        at += 2 + length
    if len(head) >= size:
        raise _broken("JPEG")
    return None  # the frame lies behind metadata longer than what was looked at


def _webp(head: bytes) -> tuple[int, int]:
    form = head[12:16]
    if form == b"VP8X" and len(head) >= 30:
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if form == b"VP8L" and len(head) >= 25 and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if form == b"VP8 " and len(head) >= 30 and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise _broken("WebP")


def _wav_rate(head: bytes) -> int:
    """Bytes per second of a WAV file, 0 for anything else."""
    if not (head.startswith(b"RIFF") and head[8:12] == b"WAVE"):
        return 0
    at = 12
    while at + 8 <= len(head):
        name, length = head[at : at + 4], int.from_bytes(head[at + 4 : at + 8], "little")
        if name == b"fmt ":
            if at + 20 > len(head):
                break
            return int.from_bytes(head[at + 16 : at + 20], "little")
        at += 8 + length + (length & 1)
    return 0
