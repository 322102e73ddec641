"""Files that are on disk, whole and under their name, or not there at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path

from vllm_suite.checkpoints.source import CHUNK_BYTES

Piece = bytes | bytearray | memoryview


def save(path: Path, content: bytes | Path, temporary: str) -> None:
    """Write ``content``, or copy the file that it names, to ``path`` by way of ``.NAME`` + ``temporary``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}{temporary}")
    with new.open("wb", buffering=0) as file:
        if isinstance(content, Path):
            with content.open("rb") as original:
                shutil.copyfileobj(original, file, CHUNK_BYTES)
        else:
            write_all(file.fileno(), content)
        os.fsync(file.fileno())
    os.replace(new, path)
    sync_folder(path.parent)


def write_all(fd: int, data: Piece) -> None:
    """All of ``data``, however many writes it takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(folder: Path) -> None:
    """The names in ``folder`` are on disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_words(error: OSError, out: Path) -> str:
    """One line for the person whose run it ended."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "; make room and run the same command again" if full else ""
    where = f"{error.filename}: " if error.filename else f"{out}.partial: " if full else ""
    return f"{where}{error.strerror or error}{advice}"
