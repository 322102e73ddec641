"""Rows of a batch: which documents, in which order, at which step. A pure function of data and seed.

Resuming needs no state of a loader: the batch of step ``s`` is the same whoever asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_swiftkv.distill.store import Store

Row = NDArray[np.int64]
"""Numbers of the documents that share a row."""


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward pass, [B, T] each.

    Attributes:
        ids: tokens; zeros beyond a row's end.
        positions: within each document; they start again at 0 for the next one and for what lies beyond the end, so
            no document, and no padding, is seen from another.
        labels: the token that follows, within the same document.
        learn: the token that follows is one to learn.
        real: no padding.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    learn: Tensor
    real: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        return Batch(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))


def pack(lengths: NDArray[np.int64], documents: NDArray[np.int64], max_length: int, packing: bool) -> list[Row]:
    """Documents into rows of at most ``max_length`` tokens, in the order given; one per row without ``packing``."""
    rows: list[list[int]] = []
    room = 0
    for document in documents.tolist():
        length = int(lengths[document])
        if not packing or length > room or not rows:
            rows.append([])
            room = max_length
        rows[-1].append(document)
        room -= length
    return [np.array(row, dtype=np.int64) for row in rows]


def split_held_out(count: int, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the documents to train on and of those to measure on, at least one each where there are two."""
    order = np.random.default_rng([seed, 0]).permutation(count)
    held = min(max(1, round(share * count)), count - 1)
    return order[held:], order[:held]


class Schedule:
    """The rows of every step: each epoch all rows in an order of its own, one epoch after the other."""

    def __init__(self, rows: Sequence[Row], per_step: int, seed: int) -> None:
        self.rows, self.per_step, self.seed = rows, per_step, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def steps(self, epochs: float) -> int:
        """Steps that ``epochs`` passes take, at least one."""
        return max(1, round(epochs * len(self.rows) / self.per_step))

    def at(self, step: int) -> list[Row]:
        """The ``per_step`` rows of step ``step``, counted from 0."""
        return [self._row(step * self.per_step + i) for i in range(self.per_step)]

    def _row(self, index: int) -> Row:
        epoch, place = divmod(index, len(self.rows))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.rows))
        return self.rows[int(self._order[place])]


def tokens_of(store: Store, row: Row) -> int:
    """Tokens that a row holds."""
    return int((store.offsets[row + 1] - store.offsets[row]).sum())


def collate(store: Store, rows: Sequence[Row]) -> Batch:
    """Rows of documents as tensors, padded to the longest."""
    width = max(tokens_of(store, row) for row in rows)
    ids, positions, labels = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    learn, real = (torch.zeros(len(rows), width, dtype=torch.bool) for _ in range(2))
    for r, row in enumerate(rows):
        at = 0
        for document in row.tolist():
            here = slice(int(store.offsets[document]), int(store.offsets[document + 1]))
            tokens = torch.from_numpy(store.tokens[here].astype(np.int64))
            mask = torch.from_numpy(store.learn[here].astype(bool))
            end = at + len(tokens)
            ids[r, at:end], positions[r, at:end], real[r, at:end] = tokens, torch.arange(len(tokens)), True
            labels[r, at : end - 1], learn[r, at : end - 1] = tokens[1:], mask[1:]
            at = end
        positions[r, at:] = torch.arange(width - at)
    return Batch(ids, positions, labels, learn, real)
