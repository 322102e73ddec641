"""DistServe's latency model: prefill quadratic in each prompt's length, decode linear in context and batch.

The form and the coefficients are those of its simulator (LLMServe/DistServe, commit 82831f1, Apache-2.0), fitted to
A100-80GB with OPT in FP16; see `distserve.yaml` beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from vllm_suite.planner.sources.base import FloatArray, LatencySource, Outside, SourceError, Uncertainty, as_arrays
from vllm_suite.planner.sources.steps import DecodeLine, Steps

Triple = tuple[float, float, float]
_FILE = Path(__file__).with_name("distserve.yaml")


@dataclass(frozen=True)
class Coefficients:
    """Milliseconds.

    Attributes:
        prefill: constant, per prompt token, per squared length of each prompt.
        decode_small, decode_large: constant, per context token, per sequence; of batches below `threshold`, and of
            the others.
    """

    prefill: Triple
    decode_small: Triple
    decode_large: Triple
    threshold: int = 95


class LinearSource(LatencySource):
    """Steps are prefill or decode, never both, as in DistServe and in vLLM without chunked prefill.

    Lengths of prompts enter squared one by one, so chunks after a cached prefix are refused.
    """

    def __init__(self, coefficients: Coefficients, *, pp: int = 1, name: str = "linear") -> None:
        self.coefficients, self.stages, self.name = coefficients, pp, name
        self.uncertainty = Uncertainty(0.05, "fit on relative error; the DistServe paper gives no residuals")
        self.outside = Outside("refuse")

    def step_seconds(self, steps: Steps) -> float:
        """See `LatencySource`: a batch goes through one stage after the other."""
        return self.stages * self.stage_seconds(steps)

    def stage_seconds(self, steps: Steps) -> float:
        """See `LatencySource`; this is the published formula.

        Raises:
            SourceError: a step that has both prompts and decoded tokens, or a chunk after a prefix.
        """
        if steps.prefill_chunks and steps.decode_sequences:
            raise SourceError(f"{self.name}: a step is prefill or decode, not both")
        if steps.prefill_chunks:
            return self._prefill(steps)
        if steps.decode_sequences:
            return self._decode(int(steps.decode_sequences), steps.decode_context)
        return 0.0

    def seconds(self, steps: Steps) -> FloatArray:
        """See `LatencySource`."""
        rows = as_arrays(steps)
        flat = np.stack([each.ravel() for each in rows], axis=1).tolist()
        found = np.array([self.step_seconds(Steps(*row)) for row in flat], dtype=float)
        return found.reshape(rows.prefill_tokens.shape)

    def decode_line(self, sequences: int, context: float, longest: float = 0, shortest: float = 0) -> DecodeLine:
        """See `LatencySource`."""
        slope = self._decode_set(sequences)[1] * sequences
        return DecodeLine(self.stages * self._decode(sequences, context), slope * 1e-3)

    def _prefill(self, steps: Steps) -> float:
        if steps.prefill_context:
            raise SourceError(f"{self.name}: prompts are computed whole, without a cached prefix")
        constant, linear, square = self.coefficients.prefill
        # Without a prefix a prompt of l tokens has (l² + l) / 2 pairs.
        squares = 2 * steps.prefill_pairs - steps.prefill_tokens
        milliseconds = constant + linear * steps.prefill_tokens + square * squares
        # A pipeline adds a millisecond for each stage to a prefill, and nothing to a decode step.
        return float(milliseconds / self.stages + self.stages) * 1e-3

    def _decode(self, sequences: int, context: float) -> float:
        constant, per_token, per_sequence = self._decode_set(sequences)
        return float(constant + per_token * context + per_sequence * sequences) / self.stages * 1e-3

    def _decode_set(self, sequences: int) -> Triple:
        own = self.coefficients
        return own.decode_small if sequences < own.threshold else own.decode_large


@cache
def _published() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return found


def distserve(model: str, tp: int, *, pp: int = 1, engine: Literal["distserve", "vllm"] = "distserve") -> LinearSource:
    """The published coefficients of a model and a tensor-parallel size. Raises SourceError where there are none."""
    by_tp = _published()[engine].get(model, {})
    if tp not in by_tp:
        known = [f"{name} TP{size}" for name, sizes in _published()[engine].items() for size in sizes]
        raise SourceError(f"no DistServe coefficients for {model} TP{tp}; there are {', '.join(known)}")
    prefill, small, large = (tuple(map(float, row)) for row in by_tp[tp])
    return LinearSource(
        Coefficients(prefill, small, large),  # type: ignore[arg-type]
        pp=pp,
        name=f"{engine} {model} TP{tp}",
    )
