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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_suite.checkpoints import disk
from vllm_suite.checkpoints.disk import Piece
from vllm_suite.checkpoints.progress import Progress, human
from vllm_suite.checkpoints.shards import Entry, Plan, Shard
from vllm_suite.checkpoints.source import CONFIG, INDEX, CheckpointError, Source, read_json

_TEMPORARY = ".tmp"
# What a file system needs beside the bytes themselves.
_SPARE_BYTES = 16 << 20

Data = Callable[[Entry], Iterable[Piece]]


@dataclass(frozen=True)
class Kind:
    """What is being made: `noun` is its name in messages, `manifest` the file that says so.

    `changes`: what to say, in place of both values, where a key of the plan's facts differs from the manifest's.
    """

    noun: str
    manifest: str
    changes: dict[str, str]


class Output:
    """The result of one plan, being written. A context manager: it holds a lock on ``OUT.partial``.

    `side` is the checkpoint whose tokenizer and other files go into the result; `sources` are all that are read.
    `notes` is JSON beside the plan in the manifest: what a run that goes on need not compute again, or what the
    result is to say about itself. Raises CheckpointError where ``OUT`` or ``OUT.partial`` is not this plan's, is in
    use, or the disk has no room.
    """

    def __init__(self, out: Path, kind: Kind, plan: Plan, side: Source, sources: Sequence[Source]) -> None:
        self.out = Path(os.path.realpath(out))
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.notes: dict[str, Any] = {}
        self._kind = kind
        self._plan = plan
        self._side = side
        self._lock: int | None = None
        self._digests: dict[str, str] = {}
        for source in sources:
            if Path(os.path.realpath(source.folder)) in (self.out, *self.out.parents):
                raise CheckpointError(f"the result {self.out} would lie inside the model's folder")

    @property
    def finished(self) -> bool:
        """Whether ``OUT`` is this very result, done. Raises CheckpointError where it is anything else."""
        if not os.path.lexists(self.out) or (self.out.is_dir() and not any(self.out.iterdir())):
            return False
        if not self.out.is_dir():
            raise CheckpointError(f"{self.out} is in the way; nothing is overwritten")
        if not (self.out / self._kind.manifest).is_file():
            raise CheckpointError(f"{self.out} is not empty and not a {self._kind.noun}; nothing is overwritten")
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
            raise CheckpointError(f"{self.partial} is in use by another {self._kind.noun}") from None
        except BaseException:
            self._release()
            raise
        for path in self.partial.rglob(f".*{_TEMPORARY}"):
            path.unlink()
        self.save_manifest()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _read_manifest(self) -> None:
        if os.path.lexists(self.partial) and not self.partial.is_dir():
            raise CheckpointError(f"{self.partial} is in the way; nothing is overwritten")
        if (self.partial / self._kind.manifest).is_file():
            self._digests = self._compare(self.partial)
        elif self.partial.is_dir() and any(not path.name.endswith(_TEMPORARY) for path in self.partial.iterdir()):
            raise CheckpointError(f"{self.partial} was not left by a {self._kind.noun}; nothing is overwritten")

    def _compare(self, folder: Path) -> dict[str, str]:
        """SHA-256 by weight file from the manifest in `folder`. Raises CheckpointError for another plan's."""
        manifest = read_json(folder / self._kind.manifest)
        facts, digests = manifest.pop("plan", None), manifest.pop("shards", None)
        if not isinstance(facts, dict) or not isinstance(digests, dict):
            raise CheckpointError(
                f"{folder / self._kind.manifest} is damaged; remove {folder} and run the command again"
            )
        keys = [key for key in sorted(facts | self._plan.facts) if facts.get(key) != self._plan.facts.get(key)]
        if keys:
            details = ", ".join(
                self._kind.changes.get(key) or f"{key} {facts.get(key)} there, {self._plan.facts.get(key)} here"
                for key in keys
            )
            raise CheckpointError(
                f"{folder} belongs to another {self._kind.noun} ({details}); remove it or choose another output"
            )
        self.notes = manifest
        return digests

    def _check_room(self) -> None:
        # What is there stays or, where it is temporary, goes.
        there = self.partial.rglob("*") if self.partial.is_dir() else ()
        have = sum(path.stat().st_size for path in there if path.is_file())
        need = self._plan.size + sum(self._side.side_files().values()) - have + _SPARE_BYTES
        folder = next(path for path in (self.partial, *self.partial.parents) if path.is_dir())
        free = shutil.disk_usage(folder).free
        if need > free:
            raise CheckpointError(f"{folder} has {human(free)} free; the {self._kind.noun} needs {human(need)}")

    def remaining(self, say: Callable[[str], None]) -> list[Shard]:
        """The weight files still to be written; finished ones are read and compared with the manifest's SHA-256."""
        left: list[Shard] = []
        for shard in self._plan.shards:
            path = self.partial / shard.name
            if path.exists() and disk.sha256_of(path) == self._digests.get(shard.name):
                continue
            if path.exists():
                say(f"{shard.name} is damaged; writing it again")
                path.unlink()
            left.append(shard)
        return left

    def write_shard(self, shard: Shard, data: Data, advance: Callable[[int], None]) -> None:
        """Write one weight file; `data` gives the bytes of a tensor, `advance` is told of them as they go."""
        temporary = self.partial / f".{shard.name}{_TEMPORARY}"
        digest = hashlib.sha256(shard.header)
        with temporary.open("wb", buffering=0) as file:
            disk.write_all(file.fileno(), shard.header)
            for entry in shard.entries:
                for piece in data(entry):
                    disk.write_all(file.fileno(), piece)
                    digest.update(piece)
                    advance(len(piece))
            os.fsync(file.fileno())
        self._digests[shard.name] = digest.hexdigest()
        self.save_manifest()
        os.rename(temporary, self.partial / shard.name)
        disk.sync_folder(self.partial)

    def write_rest(self) -> None:
        """Copy the tokenizer and whatever else lies beside the weights; then the config; the index last."""
        for name in self._side.side_files():
            # The model may itself be such a result.
            if name != self._kind.manifest:
                self._save(name, self._side.folder / name)
        self._save(CONFIG, (json.dumps(self._plan.config, indent=2) + "\n").encode())
        self._save(INDEX, (json.dumps(self._plan.index, indent=2) + "\n").encode())

    def finish(self) -> None:
        """Make ``OUT.partial`` ``OUT``."""
        disk.sync_folder(self.partial)
        try:
            # Onto nothing or an empty folder; anything else that has appeared meanwhile is an error, never lost.
            os.rename(self.partial, self.out)
        except OSError as error:
            raise CheckpointError(
                f"{self.partial} is complete but cannot become {self.out}: {error.strerror}"
            ) from None
        disk.sync_folder(self.out.parent)

    def save_manifest(self) -> None:
        """Write plan, digests and notes."""
        manifest = {"plan": self._plan.facts, "shards": self._digests, **self.notes}
        self._save(self._kind.manifest, (json.dumps(manifest, indent=1) + "\n").encode())

    def _save(self, name: str, content: bytes | Path) -> None:
        disk.save(self.partial / name, content, _TEMPORARY)


def write_shards(output: Output, plan: Plan, progress: Progress, begin: Callable[[], Data]) -> dict[str, Any]:
    """Write the weight files that `output`, whose lock is held, still lacks. `begin` makes what gives their data and
    is called where there is one to write. Returns the names of those written and of those found, for the report."""
    left = output.remaining(progress.say)
    done = plan.size - sum(shard.size for shard in left)
    if done:
        progress.say(f"going on: {len(plan.shards) - len(left)} of {len(plan.shards)} weight files are there")
    if left:
        data = begin()
        progress.start(plan.size, done)
        for shard in left:
            progress.advance(len(shard.header))
            output.write_shard(shard, data, progress.advance)
            progress.wrote(shard.name)
        progress.stop()
    return shards_report(plan, [shard.name for shard in left])


def shards_report(plan: Plan, written: Sequence[str]) -> dict[str, Any]:
    """What a report says about weight files."""
    reused = [shard.name for shard in plan.shards if shard.name not in set(written)]
    return {"shards_written": list(written), "shards_reused": reused}
