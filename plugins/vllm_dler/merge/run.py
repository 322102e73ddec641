"""The whole merge: check, plan, select, write, read back, rename."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_dler.merge.deltas import Piece as Pair
from vllm_dler.merge.deltas import from_float32, pieces
from vllm_dler.merge.plan import FLOATS, MergePlan, make_plan
from vllm_dler.merge.topk import Cut, cut_model, cut_tensor, kept
from vllm_suite.checkpoints.disk import Piece, in_words
from vllm_suite.checkpoints.output import Kind, Output, shards_report, write_shards
from vllm_suite.checkpoints.progress import Progress, human, peak_rss
from vllm_suite.checkpoints.readback import check_structure
from vllm_suite.checkpoints.shards import DEFAULT_SHARD_BYTES, Entry
from vllm_suite.checkpoints.source import CheckpointError, Source, pread, read_header
from vllm_suite.provenance import provenance

KIND = Kind(
    noun="merge",
    manifest="dler_merge.json",
    changes={
        "base": "the base's weights changed",
        "tuned": "the tuned weights changed",
        "config": "the tuned model's config.json changed",
    },
)
_SELECTION = "selection"


class ReadBackError(CheckpointError):
    """The written checkpoint is not what was planned."""


@dataclass(frozen=True)
class Request:
    """What to merge: `base` + `scale` x the largest `keep` of (`tuned` - `base`), a share of each tensor's elements
    or, with `scope` "global", of the whole model's. `dtype`: whose the result has, the base's or the tuned model's.
    `shard_bytes`: data per weight file."""

    base: Path
    tuned: Path
    out: Path
    keep: float = 0.25
    scale: float = 0.7
    scope: str = "tensor"
    dtype: str = "base"
    shard_bytes: int = DEFAULT_SHARD_BYTES
    verify: bool = True


def merge(request: Request, progress: Progress) -> dict[str, Any]:
    """Do it, or go on with it, and return a report of JSON types.

    The result has the tuned checkpoint's config and tokenizer. Memory beyond the interpreter's
    is a few tens of MiB and, with `scope` "global", 8 KiB a tensor. Raises CheckpointError with one line for the
    person who asked; then ``OUT`` does not exist, and what ``OUT.partial`` holds is used by the next attempt.
    """
    began = time.monotonic()
    try:
        with Source(request.base) as base, Source(request.tuned) as tuned:
            plan = make_plan(
                base, tuned, request.keep, request.scale, request.scope, request.dtype, request.shard_bytes
            )
            if plan.differences:
                progress.say(f"config.json differs in {', '.join(plan.differences)}; the tuned model's is taken")
            done = _Merge(request, plan, base, tuned, progress).run()
    except OSError as error:
        raise CheckpointError(in_words(error, request.out)) from error
    return {
        "ok": True,
        "base": str(request.base),
        "tuned": str(request.tuned),
        "out": str(request.out),
        "keep": request.keep,
        "scale": request.scale,
        "scope": request.scope,
        "dtype": request.dtype,
        "tensors": sum(1 for _ in plan.entries),
        "copied": list(plan.copied),
        "tied": list(plan.tied),
        "config_differences": list(plan.differences),
        "bytes": plan.size,
        **done,
        "seconds": time.monotonic() - began,
        "peak_rss_bytes": peak_rss(),
        "plan": plan.digest,
    }


class _Merge:
    """One merge of two opened checkpoints."""

    def __init__(self, request: Request, plan: MergePlan, base: Source, tuned: Source, progress: Progress) -> None:
        self._request = request
        self._plan = plan
        self._base = base
        self._tuned = tuned
        self._progress = progress
        self._output = Output(request.out, KIND, plan, side=tuned, sources=[base, tuned])
        self._cuts: dict[str, Cut] = {}

    def run(self) -> dict[str, Any]:
        """Returns the report's figures."""
        output, progress = self._output, self._progress
        if output.finished:
            progress.say(f"{output.out} is this merge, finished before")
            self._cuts = self._selected() or self._select()
            self._verify(output.out)
            return {**self._figures(), **shards_report(self._plan, [])}
        with output:
            self._cuts = self._selected() or self._select()
            figures = self._figures()
            if not figures["changed"]:
                raise CheckpointError(f"no weight of {self._tuned.folder} differs from {self._base.folder}")
            output.notes |= {
                _SELECTION: {name: list(cut) for name, cut in self._cuts.items()},
                "base": str(self._request.base),
                "tuned": str(self._request.tuned),
                "formula": "base + scale * largest(keep, |tuned - base|)",
                **figures,
                "provenance": provenance(),
            }
            output.save_manifest()
            shards = write_shards(output, self._plan, progress, begin=lambda: self._data)
            output.write_rest()
            self._base.check_unchanged()
            self._tuned.check_unchanged()
            self._verify(output.partial)
            output.finish()
        return {**figures, **shards}

    def _figures(self) -> dict[str, int]:
        return {
            "elements": sum(self._plan.elements.values()),
            "changed": sum(cut.changed for cut in self._cuts.values()),
            "kept": sum(cut.kept for cut in self._cuts.values()),
        }

    def _selected(self) -> dict[str, Cut]:
        """What an interrupted run had selected; empty where it had not come so far."""
        rows = self._output.notes.get(_SELECTION)
        if not isinstance(rows, dict) or rows.keys() != self._plan.elements.keys():
            return {}
        try:
            return {name: Cut(*(int(number) for number in row)) for name, row in rows.items()}
        except (TypeError, ValueError):
            return {}

    def _select(self) -> dict[str, Cut]:
        sizes, keep = self._plan.elements, self._request.keep

        def read(name: str) -> Iterator[Pair]:
            for pair in pieces(self._base, self._tuned, name):
                yield pair
                self._progress.advance(pair.base.size)

        # Elements, each read twice.
        self._progress.start(2 * sum(sizes.values()), 0, "selecting the largest updates")
        if self._request.scope == "global":
            cuts = cut_model(read, sizes, keep)
        else:
            cuts = {name: cut_tensor(read, name, sizes[name], keep) for name in sizes}
        self._progress.stop()
        return cuts

    def _data(self, entry: Entry) -> Iterator[Piece]:
        """The bytes of a tensor of the result."""
        if entry.dtype not in FLOATS:
            yield from self._tuned.chunks(self._tuned.tensors[entry.name])
            return
        cut, scale = self._cuts[entry.name], np.float32(self._request.scale)
        ties = cut.ties
        for pair in pieces(self._base, self._tuned, entry.name):
            chosen, ties = kept(pair, cut.threshold, ties)
            with np.errstate(over="ignore"):
                np.multiply(pair.delta, scale, out=pair.delta)
                np.add(pair.base, pair.delta, out=pair.base, where=chosen)
            merged = from_float32(pair.base, entry.dtype)
            if merged is None:
                raise CheckpointError(f"{entry.name}: a merged weight is too large for {entry.dtype}")
            yield merged.view(np.uint8).data

    def _verify(self, folder: Path) -> None:
        """Structure of the whole; first bytes of each weight file's first and last tensor. Raises ReadBackError."""
        if not self._request.verify:
            return
        try:
            check_structure(folder, self._plan)
        except CheckpointError as error:
            raise ReadBackError(str(error)) from error
        compared = 0
        for shard in self._plan.shards:
            tensors = read_header(folder / shard.name)[1]
            with (folder / shard.name).open("rb") as file:
                for entry in (shard.entries[0], shard.entries[-1]):
                    expected = bytes(next(iter(self._data(entry)), b""))
                    if pread(file.fileno(), len(expected), tensors[entry.name].begin, shard.name) != expected:
                        raise ReadBackError(f"{folder / shard.name}: {entry.name} is not what was merged")
                    compared += len(expected)
        self._progress.say(f"verified: every tensor's place, shape and dtype; {human(compared)} of the values")
