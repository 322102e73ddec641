"""An ordinary Hugging Face checkpoint on disk: its config, and where the bytes of each tensor lie.

Tensors are read as byte ranges, never mapped: a copy needs no more memory than its buffer, whatever the size of
the tensor, and any dtype comes out bit for bit. The library that reads safetensors gives no byte positions, so
the header is read here (8-byte length, JSON, data: https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHUNK_BYTES = 4 << 20
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
# What may hold weights in other forms. None of it belongs into the result.
WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz"}
)
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt"})
# A trainer's intermediate states, whole checkpoints themselves.
_TRAINER_STATE = re.compile(r"checkpoint-\d+")
_LONGEST_HEADER = 100_000_000  # the library's own limit


class CheckpointError(ValueError):
    """What was asked for cannot be done. The text is one line for the person who asked; nothing was lost."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `size` bytes from `begin` of `file`. `dtype` is safetensors' code, such as ``BF16``."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int


@dataclass(frozen=True)
class FileFacts:
    """What tells one version of a weight file from another without reading all of it."""

    size: int
    mtime_ns: int
    header: str

    @property
    def identity(self) -> list[Any]:
        """JSON form."""
        return [self.size, self.mtime_ns, self.header]


class Source:
    """An opened checkpoint. Close it, or use it as a context manager.

    Raises CheckpointError where the folder holds no readable safetensors checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._fds: dict[str, int] = {}
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} is no folder; download the checkpoint first: hf download NAME --local-dir DIR"
            )
        self.config = read_json(folder / CONFIG)
        self.tensors: dict[str, Tensor] = {}
        self.files: dict[str, FileFacts] = {}
        try:
            names, indexed = _weight_files(folder)
            for name in names:
                self._add(name)
        except BaseException:
            self.close()
            raise
        for tensor, file in indexed.items():
            if tensor not in self.tensors or self.tensors[tensor].file != file:
                raise CheckpointError(f"{folder}: the index places {tensor} in {file}, which does not have it")

    def _add(self, name: str) -> None:
        path = self.folder / name
        stat = os.stat(path)
        header, tensors = read_header(path)
        for tensor, where in tensors.items():
            if tensor in self.tensors:
                raise CheckpointError(f"{tensor} is in both {self.tensors[tensor].file} and {name}")
            self.tensors[tensor] = where
        self.files[name] = FileFacts(stat.st_size, stat.st_mtime_ns, hashlib.sha256(header).hexdigest())

    def read(self, tensor: Tensor, offset: int, size: int) -> bytearray:
        """`size` bytes from `offset` of the tensor. Raises CheckpointError where the file has become shorter."""
        if tensor.file not in self._fds:
            self._fds[tensor.file] = os.open(self.folder / tensor.file, os.O_RDONLY)
        return pread(self._fds[tensor.file], size, tensor.begin + offset, tensor.file)

    def chunks(self, tensor: Tensor, chunk: int = CHUNK_BYTES) -> Iterator[bytearray]:
        """The tensor's bytes, at most `chunk` at a time."""
        for offset in range(0, tensor.size, chunk):
            yield self.read(tensor, offset, min(chunk, tensor.size - offset))

    def check_unchanged(self) -> None:
        """Raises CheckpointError where a weight file is not the one that was opened."""
        for name, facts in self.files.items():
            stat = os.stat(self.folder / name)
            if (stat.st_size, stat.st_mtime_ns) != (facts.size, facts.mtime_ns):
                raise CheckpointError(f"{self.folder / name} changed while it was read; run the command again")

    def side_files(self) -> dict[str, int]:
        """Relative path and size of every file that is neither weights nor config: tokenizer, chat template, …"""
        found: dict[str, int] = {}
        for folder, folders, names in os.walk(self.folder):
            folders[:] = sorted(f for f in folders if not (f.startswith(".") or _TRAINER_STATE.fullmatch(f)))
            for name in sorted(names):
                path = Path(folder) / name
                relative = path.relative_to(self.folder).as_posix()
                weights = path.suffix in WEIGHT_SUFFIXES or name.endswith(".index.json")
                if not (name.startswith(".") or weights or relative == CONFIG):
                    found[relative] = path.stat().st_size
        return found

    def close(self) -> None:
        """Close the files."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}: this is no Hugging Face checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: an object is expected, found {type(value).__name__}")
    return value


def read_header(path: Path) -> tuple[bytes, dict[str, Tensor]]:
    """The header of a safetensors file and its tensors. Raises CheckpointError for a truncated or foreign file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise CheckpointError(f"{path} is no complete safetensors file (a Git LFS pointer, or a broken download?)")
        header = file.read(length)
    try:
        entries = json.loads(header)
        tensors = {k: _tensor(path.name, v, 8 + length) for k, v in entries.items() if k != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: its safetensors header cannot be read: {error!r}") from None
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.size)):
        if tensor.begin != end:
            raise CheckpointError(f"{path}: its safetensors header leaves a hole or an overlap at byte {end}")
        end += tensor.size
    if end != size:
        raise CheckpointError(f"{path} has {size} bytes where its header says {end}: the file is incomplete")
    return header, tensors


def _tensor(file: str, entry: dict[str, Any], data: int) -> Tensor:
    dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
    begin, end = entry["data_offsets"]
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype {dtype} is not known here")
    if end - begin != DTYPE_BYTES[dtype] * math.prod(shape):
        raise ValueError(f"a {dtype} of shape {list(shape)} does not take {end - begin} bytes")
    return Tensor(file, dtype, shape, data + begin, end - begin)


def pread(fd: int, size: int, position: int, name: str) -> bytearray:
    """Exactly `size` bytes at `position`. Raises CheckpointError at the end of the file."""
    buffer = bytearray(size)
    view, got = memoryview(buffer), 0
    while got < size:
        count = os.preadv(fd, [view[got:]], position + got)
        if count == 0:
            raise CheckpointError(f"{name} ends at byte {position + got}, before the tensor does")
        got += count
    return buffer


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the weight files, and the index's tensor -> file where there is an index."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX} has no weight_map")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise CheckpointError(f"{folder}: {name}, named by the index, is missing")
        return names, weight_map
    if (folder / SINGLE).is_file():
        return [SINGLE], {}
    present = {path.suffix for path in folder.iterdir()}
    if ".safetensors" in present:
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}; which of its .safetensors files count?")
    if present & _PICKLES:
        raise CheckpointError(
            f"{folder} holds pickled weights (.bin, .pt), which can run code when read; save them as safetensors "
            "first: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
        )
    raise CheckpointError(f"{folder} holds no safetensors weights ({SINGLE} or {INDEX})")
