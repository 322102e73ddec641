"""Writes a planned checkpoint into ``OUT.partial`` and renames it to ``OUT`` when it is whole.

At every moment a kill leaves one of two states: no ``OUT`` and a ``OUT.partial`` from which the same request goes
on, or a finished ``OUT``. A weight file gets its name only when its bytes are on disk and its SHA-256 is in the
manifest; before that it is a hidden temporary file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_swiftkv.convert.plan import Entry, Plan, Shard
from vllm_swiftkv.convert.progress import human
from vllm_swiftkv.convert.source import CHUNK_BYTES, CONFIG, INDEX, ConvertError, Source, read_json

MANIFEST = "swiftkv_conversion.json"
_TEMPORARY = ".tmp"
# What a file system needs beside the bytes themselves.
_SPARE_BYTES = 16 << 20


class Output:
    """The result of one plan, being written. A context manager: it holds a lock on ``OUT.partial``.

    Raises ConvertError where ``OUT`` or ``OUT.partial`` is not this plan's, is in use, or the disk has no room.
    """

    def __init__(self, out: Path, plan: Plan, source: Source) -> None:
        self.out = Path(os.path.realpath(out))
        self.partial = self.out.with_name(self.out.name + ".partial")
        self._plan = plan
        self._source = source
        self._lock: int | None = None
        self._digests: dict[str, str] = {}
        folder = Path(os.path.realpath(source.folder))
        if folder in (self.out, *self.out.parents):
            raise ConvertError(f"the result {self.out} would lie inside the model's folder")

    @property
    def finished(self) -> bool:
        """Whether ``OUT`` is this very conversion, done. Raises ConvertError where it is anything else."""
        if not os.path.lexists(self.out) or (self.out.is_dir() and not any(self.out.iterdir())):
            return False
        if not self.out.is_dir():
            raise ConvertError(f"{self.out} is in the way; nothing is overwritten")
        if not (self.out / MANIFEST).is_file():
            raise ConvertError(f"{self.out} is not empty and not a conversion; nothing is overwritten")
        self._compare(self.out)
        return True

    def __enter__(self) -> Output:
        # Before anything is made, so that a refusal leaves nothing behind.
        self._read_manifest()
        self._check_room()
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._lock).st_ino != self.partial.stat().st_ino:
                raise BlockingIOError
            # Once more: another process may have ended between the first look and the lock.
            self._read_manifest()
        except (BlockingIOError, FileNotFoundError):
            self._release()
            raise ConvertError(f"{self.partial} is in use by another conversion") from None
        except BaseException:
            self._release()
            raise
        for path in self.partial.rglob(f".*{_TEMPORARY}"):
            path.unlink()
        self._save_manifest()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _read_manifest(self) -> None:
        if os.path.lexists(self.partial) and not self.partial.is_dir():
            raise ConvertError(f"{self.partial} is in the way; nothing is overwritten")
        if (self.partial / MANIFEST).is_file():
            self._digests = self._compare(self.partial)
        elif self.partial.is_dir() and any(not path.name.endswith(_TEMPORARY) for path in self.partial.iterdir()):
            raise ConvertError(f"{self.partial} was not left by a conversion; nothing is overwritten")

    def _compare(self, folder: Path) -> dict[str, str]:
        """SHA-256 by weight file from the manifest in `folder`. Raises ConvertError for another plan's."""
        manifest = read_json(folder / MANIFEST)
        facts, digests = manifest.get("plan"), manifest.get("shards")
        if not isinstance(facts, dict) or not isinstance(digests, dict):
            raise ConvertError(f"{folder / MANIFEST} is damaged; remove {folder} and convert again")
        keys = [key for key in sorted(facts | self._plan.facts) if facts.get(key) != self._plan.facts.get(key)]
        if keys:
            details = ", ".join(_difference(key, facts.get(key), self._plan.facts.get(key)) for key in keys)
            raise ConvertError(
                f"{folder} belongs to another conversion ({details}); remove it or choose another output"
            )
        return digests

    def _check_room(self) -> None:
        # What is there stays or, where it is temporary, goes.
        there = self.partial.rglob("*") if self.partial.is_dir() else ()
        have = sum(path.stat().st_size for path in there if path.is_file())
        need = self._plan.size + sum(self._source.side_files().values()) - have + _SPARE_BYTES
        folder = next(path for path in (self.partial, *self.partial.parents) if path.is_dir())
        free = shutil.disk_usage(folder).free
        if need > free:
            raise ConvertError(f"{folder} has {human(free)} free; the conversion needs {human(need)}")

    def remaining(self, say: Callable[[str], None]) -> list[Shard]:
        """The weight files still to be written; finished ones are read and compared with the manifest's SHA-256."""
        left: list[Shard] = []
        for shard in self._plan.shards:
            path = self.partial / shard.name
            if path.exists() and _sha256_file(path) == self._digests.get(shard.name):
                continue
            if path.exists():
                say(f"{shard.name} is damaged; writing it again")
                path.unlink()
            left.append(shard)
        return left

    def write_shard(self, shard: Shard, advance: Callable[[int], None]) -> None:
        """Write one weight file; `advance` is told the bytes as they go."""
        temporary = self.partial / f".{shard.name}{_TEMPORARY}"
        digest = hashlib.sha256(shard.header)
        with temporary.open("wb", buffering=0) as file:
            _write(file.fileno(), shard.header)
            for entry in shard.entries:
                for piece in data_of(entry, self._source):
                    _write(file.fileno(), piece)
                    digest.update(piece)
                    advance(len(piece))
            os.fsync(file.fileno())
        self._digests[shard.name] = digest.hexdigest()
        self._save_manifest()
        os.rename(temporary, self.partial / shard.name)
        _sync_folder(self.partial)

    def write_rest(self) -> None:
        """Copy the tokenizer and whatever else lies beside the weights; then the config; the index last."""
        for name in self._source.side_files():
            self._save(name, self._source.folder / name)
        self._save(CONFIG, (json.dumps(self._plan.config, indent=2) + "\n").encode())
        self._save(INDEX, (json.dumps(self._plan.index, indent=2) + "\n").encode())

    def finish(self) -> None:
        """Make ``OUT.partial`` ``OUT``."""
        _sync_folder(self.partial)
        try:
            # Onto nothing or an empty folder; anything else that has appeared meanwhile is an error, never lost.
            os.rename(self.partial, self.out)
        except OSError as error:
            raise ConvertError(f"{self.partial} is complete but cannot become {self.out}: {error.strerror}") from None
        _sync_folder(self.out.parent)

    def _save_manifest(self) -> None:
        self._save(
            MANIFEST, (json.dumps({"plan": self._plan.facts, "shards": self._digests}, indent=1) + "\n").encode()
        )

    def _save(self, name: str, content: bytes | Path) -> None:
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}{_TEMPORARY}")
        with temporary.open("wb", buffering=0) as file:
            if isinstance(content, Path):
                with content.open("rb") as original:
                    shutil.copyfileobj(original, file, CHUNK_BYTES)
            else:
                _write(file.fileno(), content)
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)


def data_of(entry: Entry, source: Source) -> Iterable[bytes | bytearray | memoryview]:
    """The bytes of a tensor of the result, in pieces of at most `CHUNK_BYTES`."""
    tensors = [source.tensors[name] for name in entry.sources]
    return source.chunks(tensors[0]) if len(tensors) == 1 else _mean(entry, source)


def _mean(entry: Entry, source: Source) -> Iterator[memoryview]:
    """Element-wise mean, summed in double precision and rounded once to the tensors' own dtype."""
    import torch

    dtype = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[entry.dtype]
    streams = [source.chunks(source.tensors[name], CHUNK_BYTES // 16) for name in entry.sources]
    for pieces in zip(*streams, strict=True):
        total = sum(torch.frombuffer(piece, dtype=dtype).double() for piece in pieces)
        yield (total / len(pieces)).to(dtype).view(torch.uint8).numpy().data


def _difference(key: str, there: Any, here: Any) -> str:
    if key in ("files", "config"):
        return "the source changed" if key == "files" else "the source's config.json changed"
    return f"{key} {there} there, {here} here"


def _sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(fd: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
