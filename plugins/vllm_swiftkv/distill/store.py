"""Tokenised documents on disk, mapped into memory: as many processes as train share one copy."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_swiftkv.distill.sources import Document, read_documents
from vllm_swiftkv.families import SwiftKVError

_BATCH = 512  # documents per call of the tokenizer, which uses every core for one call
_FORMAT = 1


@dataclass(frozen=True)
class Store:
    """Documents one after the other.

    Attributes:
        tokens: uint32, of all documents.
        learn: uint8, 1 where a token is one that the student is to predict.
        offsets: int64, document ``i`` is ``offsets[i]:offsets[i + 1]``.
        digest: of the content; equal for equal data and tokenizer.
        dropped: documents left out, since nothing of what to learn is within ``max_length``.
        cut_off: documents whose end was left out.
    """

    tokens: NDArray[np.uint32]
    learn: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    digest: str
    dropped: int
    cut_off: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def numbers(self) -> NDArray[np.int64]:
        """The number of each document."""
        return np.arange(len(self), dtype=np.int64)

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.offsets)


def prepare(paths: list[Path], tokenizer: Any, max_length: int, folder: Path) -> Path:
    """Tokenise files and folders into a folder under ``folder`` and return it; at once where it is there already.

    Raises SwiftKVError for bad data, with file and line, and for data with nothing to learn.
    """
    target = folder / f"data-{_key(paths, tokenizer, max_length)}"
    if (target / "meta.json").is_file():
        return target
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    offsets, dropped, cut_off, digest = [0], 0, 0, hashlib.sha256()
    with (partial / "tokens.bin").open("wb") as tokens, (partial / "learn.bin").open("wb") as learn:
        for ids, mask, more in _tokenised(read_documents(paths, tokenizer), tokenizer, max_length):
            cut_off += more
            if not mask[1:].any():  # the first token is never predicted
                dropped += 1
                continue
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes() + mask.tobytes())
            tokens.write(ids.tobytes())
            learn.write(mask.tobytes())
            offsets.append(offsets[-1] + len(ids))
    if len(offsets) == 1:
        shutil.rmtree(partial)
        raise SwiftKVError(
            f"{', '.join(map(str, paths))}: no document has anything to learn within {max_length} tokens"
        )
    np.save(partial / "offsets.npy", np.array(offsets, dtype=np.int64))
    meta = {"digest": digest.hexdigest(), "dropped": dropped, "cut_off": cut_off}
    (partial / "meta.json").write_text(json.dumps(meta))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    return target


def open_store(folder: Path) -> Store:
    """The documents that ``prepare`` wrote."""
    meta = json.loads((folder / "meta.json").read_text())
    return Store(
        tokens=np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r"),
        learn=np.memmap(folder / "learn.bin", dtype=np.uint8, mode="r"),
        offsets=np.load(folder / "offsets.npy"),
        **meta,
    )


def _key(paths: list[Path], tokenizer: Any, max_length: int) -> str:
    """Names the prepared data: any file that changed gives another name."""
    parts: list[Any] = [_FORMAT, max_length, tokenizer.chat_template, tokenizer.backend_tokenizer.to_str()]
    for path in paths:
        if not path.exists():
            raise SwiftKVError(f"{path} does not exist")
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            stat = file.stat()
            parts.append([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _tokenised(
    documents: Iterator[Document], tokenizer: Any, max_length: int
) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.uint8], bool]]:
    """Tokens, what to learn, and whether something was left out, of each document or piece of one."""
    while batch := list(itertools.islice(documents, _BATCH)):
        for document, (ids, mask) in zip(batch, _encode(batch, tokenizer), strict=True):
            if not document.splits:
                yield ids[:max_length], mask[:max_length], len(ids) > max_length
                continue
            for start in range(0, len(ids), max_length):
                yield ids[start : start + max_length], mask[start : start + max_length], False


def _encode(batch: list[Document], tokenizer: Any) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.uint8]]]:
    encoded: dict[int, Any] = {}
    for whole in (True, False):
        chosen = [i for i, d in enumerate(batch) if d.whole is whole and not d.messages]
        if chosen:
            texts = [batch[i].text for i in chosen]
            out = tokenizer(texts, add_special_tokens=not whole, return_offsets_mapping=True)
            encoded |= {i: (out["input_ids"][n], out["offset_mapping"][n]) for n, i in enumerate(chosen)}
    for i, document in enumerate(batch):
        if document.messages:
            yield _by_template(document, tokenizer)
            continue
        ids, spans = encoded[i]
        mask = [int(any(a < end and b > start for start, end in document.learn)) for a, b in spans]
        if not document.whole and tokenizer.eos_token_id is not None:
            ids, mask = [*ids, tokenizer.eos_token_id], [*mask, 1]
        yield np.array(ids, dtype=np.uint32), np.array(mask, dtype=np.uint8)


def _by_template(document: Document, tokenizer: Any) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """A conversation whose template marks the assistant's words itself."""
    try:
        out = tokenizer.apply_chat_template(
            list(document.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception as error:
        raise SwiftKVError(f"{document.where}: the chat template refuses the messages: {error}") from error
    return np.array(out["input_ids"], dtype=np.uint32), np.array(out["assistant_masks"], dtype=np.uint8)
