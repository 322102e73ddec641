"""Step times measured on this very engine and machine: what `vllm-suite calibrate` wrote."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_suite.planner.sources.base import (
    FloatArray,
    LatencySource,
    Load,
    Outside,
    SourceError,
    Uncertainty,
    as_arrays,
)
from vllm_suite.planner.sources.steps import DecodeLine, Steps

if TYPE_CHECKING:
    from vllm_suite.planner.calibrate.file import Calibration


class CalibratedSource(LatencySource):
    """Answers for the engine that was measured: its model, its device, its parallel sizes.

    Beyond the measured grid it refuses, or answers as at the edge and counts, as `outside` says. A step that decodes is
    linear in its contexts, so `decode_line` is exact up to the edge of the grid, where the line ends.
    """

    def __init__(
        self,
        calibration: Calibration,
        *,
        neighbours: float = 0.0,
        serving: str | None = None,
        prompt_s: float | None = None,
        slowdown: float = 1.0,
        outside: Outside | None = None,
    ) -> None:
        """From what a file holds.

        Args:
            neighbours: share of the time for which the other engines that were measured beside it are at work.
            serving: add what a served request sees beside the engine's steps in this kind of fleet; None for the
                engine's steps alone.
            prompt_s: seconds of the engine's cores for each prompt chunk beside the step; those of `serving` by
                default.
            slowdown: factor on all times, for other work on the engine's cores.

        Raises:
            SourceError: `neighbours` of a calibration without any, or a kind of fleet that was not measured.
        """
        fitted = calibration.alone
        model = fitted.step.model()
        if not 0 <= neighbours <= 1:
            raise SourceError(f"neighbours {neighbours:g} is a share, between 0 and 1")
        if neighbours and calibration.beside is None:
            raise SourceError("neighbours: this calibration measured one engine alone; calibrate with --engines")
        if calibration.beside is not None:
            other = calibration.beside.step.model()
            if other.knots != model.knots:
                raise SourceError("the fits alone and beside others have different knots")
            model = model.blended(other, neighbours)
            fitted = calibration.beside if neighbours > 0.5 else fitted
        step_s = sequence_s = chunk_s = 0.0
        if serving is not None:
            if serving not in calibration.serving:
                known = ", ".join(sorted(calibration.serving)) or "none"
                raise SourceError(f"serving {serving!r} was not measured; there is {known}")
            constants = calibration.serving[serving]
            step_s, sequence_s, chunk_s = constants.step_s, constants.sequence_s, constants.prompt_cpu_s
        self.calibration, self.model = calibration, model
        self.bounds = fitted.bounds
        self.name = f"calibrated {calibration.model} on {calibration.machine}"
        held_out = fitted.held_out
        self.uncertainty = Uncertainty(
            held_out.two_thirds,
            f"{held_out.folds}-fold cross-validation over {held_out.cells} measured batches: mean {held_out.mean:.1%},"
            f" nine in ten within {held_out.p90:.1%}, worst {held_out.worst:+.1%} ({held_out.worst_cell})",
        )
        self.outside = Outside("refuse") if outside is None else outside
        self._host = step_s, sequence_s, chunk_s if prompt_s is None else prompt_s
        self._slowdown = slowdown

    @classmethod
    def load(cls, path: Path, **options: float) -> CalibratedSource:
        """From a file; options as of the constructor. Raises SourceError."""
        from vllm_suite.planner.calibrate.file import load

        return cls(load(path), **options)  # type: ignore[arg-type]

    def loaded(self, load: Load) -> CalibratedSource:
        """See `LatencySource`; in place of what this one was made with. Raises SourceError as the constructor does."""
        return CalibratedSource(
            self.calibration,
            neighbours=load.neighbours,
            serving=load.serving,
            prompt_s=load.prompt_s,
            slowdown=load.slowdown,
            outside=self.outside if load.counted else Outside(self.outside.policy),
        )

    def step_seconds(self, steps: Steps) -> float:
        """See `LatencySource`. Raises SourceError beyond the grid where `outside` refuses."""
        tokens = steps.prefill_tokens + steps.decode_sequences
        if not tokens:
            return 0.0
        steps = self._inside(steps)
        served: float = self._served(steps)
        return self._slowdown * (self.model.step_seconds(steps) + served)

    def seconds(self, steps: Steps) -> FloatArray:
        """See `LatencySource`."""
        rows = as_arrays(steps)
        shape = rows.prefill_tokens.shape
        rows = self._all_inside(Steps(*(np.atleast_1d(np.array(each)) for each in rows)))
        served = self._served(rows)
        busy = rows.prefill_tokens + rows.decode_sequences > 0
        found = np.where(busy, self._slowdown * (self.model.seconds(rows) + served), 0.0)
        return np.asarray(found.reshape(shape))

    def _served(self, steps: Steps) -> Any:
        step_s, sequence_s, chunk_s = self._host
        return step_s + sequence_s * (steps.decode_sequences + steps.prefill_chunks) + chunk_s * steps.prefill_chunks

    def decode_line(self, sequences: int, context: float, longest: float = 0, shortest: float = 0) -> DecodeLine:
        """See `LatencySource`."""
        first = self.step_seconds(Steps(0, 0, 0, 0, sequences, context, longest, shortest))
        high = self.bounds.context_high * sequences
        if context >= high:
            return DecodeLine(first, 0.0, 1 if self.outside.policy == "refuse" else math.inf)
        low = self.bounds.context_low * sequences
        if context < low:
            # At the edge until the contexts have grown into the grid.
            return DecodeLine(first, 0.0, max(1, math.ceil((low - context) / sequences)))
        left = math.floor((high - context) / sequences) + 1
        return DecodeLine(first, self._slowdown * self.model.key * sequences, left)

    def _inside(self, steps: Steps) -> Steps:
        """One step, moved into the grid."""
        clamp, bounds = self.outside.clamp, self.bounds
        tokens, sequences, chunks = steps.prefill_tokens, steps.decode_sequences, steps.prefill_chunks
        context, before = steps.decode_context, steps.prefill_context
        if sequences:
            mean = clamp(
                "mean context of decoding sequences", context / sequences, bounds.context_low, bounds.context_high
            )
            if mean != context / sequences:
                context = mean * sequences
            sequences = clamp("decoding sequences", sequences, 0, bounds.sequences)
        if chunks:
            mean = before / chunks
            if clamp("tokens before a prompt chunk", mean, 0, bounds.before) != mean:
                before = bounds.before * chunks
            chunks = clamp("prompt chunks in a step", chunks, 0, bounds.chunks)
        if tokens + sequences > bounds.tokens:
            tokens = clamp("tokens in a step", tokens + sequences, 0, bounds.tokens) - sequences
        return steps._replace(
            prefill_tokens=tokens,
            prefill_chunks=chunks,
            prefill_context=before,
            decode_sequences=sequences,
            decode_context=context,
        )

    def _all_inside(self, rows: Steps) -> Steps:
        """Arrays of steps, moved into the grid as `_inside` does."""
        bounds, clamp = self.bounds, self.outside.clamp_all
        some, prompts = rows.decode_sequences > 0, rows.prefill_chunks > 0
        mean = rows.decode_context / np.where(some, rows.decode_sequences, 1.0)
        kept = mean.copy()
        kept[some] = clamp("mean context of decoding sequences", mean[some], bounds.context_low, bounds.context_high)
        context = np.where(kept == mean, rows.decode_context, kept * rows.decode_sequences)
        sequences = clamp("decoding sequences", rows.decode_sequences, 0, bounds.sequences)
        mean = rows.prefill_context / np.where(prompts, rows.prefill_chunks, 1.0)
        kept = mean.copy()
        kept[prompts] = clamp("tokens before a prompt chunk", mean[prompts], 0, bounds.before)
        before = np.where(kept == mean, rows.prefill_context, kept * rows.prefill_chunks)
        chunks = clamp("prompt chunks in a step", rows.prefill_chunks, 0, bounds.chunks)
        every = rows.prefill_tokens + sequences
        tokens = np.where(
            every > bounds.tokens, clamp("tokens in a step", every, 0, bounds.tokens) - sequences, rows.prefill_tokens
        )
        return rows._replace(
            prefill_tokens=tokens,
            prefill_chunks=chunks,
            prefill_context=before,
            decode_sequences=sequences,
            decode_context=context,
        )
