"""DistServe's coefficients as a source for the planner's own simulator, whose engines compute prompts beside decode."""

from __future__ import annotations

import numpy as np

from vllm_suite.planner.distserve.ring import OVERHEAD_MS, OVERHEAD_PER_TOKEN_MS
from vllm_suite.planner.sources.base import FloatArray, LatencySource, Outside, Uncertainty, as_arrays
from vllm_suite.planner.sources.linear import LinearSource
from vllm_suite.planner.sources.steps import DecodeLine, Steps


class EngineSource(LatencySource):
    """The times of a `linear` source with the overhead that DistServe's simulator adds, for steps of any kind.

    The coefficients were fitted to engines that compute either prompts or decode. A step with both is taken as both
    one after the other with the smaller of the two constants left out: that is mostly reading weights, done once.
    A chunk after a prefix costs what it adds to the whole prompt's square.
    """

    def __init__(self, linear: LinearSource, *, overhead: bool = True) -> None:
        self.linear, self.stages, self.name = linear, linear.stages, f"{linear.name}, mixed steps"
        self.uncertainty = Uncertainty(0.1, "fit without residuals; steps with prompts and decode are an assumption")
        self.outside = Outside("refuse")
        self._fixed, self._per_token = (OVERHEAD_MS, OVERHEAD_PER_TOKEN_MS) if overhead else (0.0, 0.0)

    def step_seconds(self, steps: Steps) -> float:
        """See `LatencySource`."""
        return self.stages * self._stage_ms(steps) * 1e-3 + self._overhead_ms(steps) * 1e-3

    def stage_seconds(self, steps: Steps) -> float:
        """See `LatencySource`; the first stage has the overhead."""
        return (self._stage_ms(steps) + self._overhead_ms(steps)) * 1e-3

    def seconds(self, steps: Steps) -> FloatArray:
        """See `LatencySource`."""
        rows = as_arrays(steps)
        flat = np.stack([each.ravel() for each in rows], axis=1).tolist()
        return np.array([self.step_seconds(Steps(*row)) for row in flat]).reshape(rows.prefill_tokens.shape)

    def decode_line(self, sequences: int, context: float, longest: float = 0, shortest: float = 0) -> DecodeLine:
        """See `LatencySource`."""
        line = self.linear.decode_line(sequences, context, longest, shortest)
        first = line.seconds + self._overhead_ms(Steps(decode_sequences=sequences, decode_context=context)) * 1e-3
        return DecodeLine(first, line.slope + self._per_token * sequences * 1e-3, line.steps)

    def _overhead_ms(self, steps: Steps) -> float:
        # There contexts are counted without the token that is being decoded.
        tokens = steps.prefill_tokens + steps.decode_context - steps.decode_sequences
        return float(self._fixed + self._per_token * tokens) if steps.tokens else 0.0

    def _stage_ms(self, steps: Steps) -> float:
        own, total = self.linear.coefficients, 0.0
        small = steps.decode_sequences < own.threshold
        decode = own.decode_small if small else own.decode_large
        if steps.prefill_chunks:
            constant, linear, square = own.prefill
            squares = 2 * steps.prefill_pairs - steps.prefill_tokens
            total += (constant + linear * steps.prefill_tokens + square * squares) / self.stages + self.stages
        if steps.decode_sequences:
            each = decode[0] + decode[1] * steps.decode_context + decode[2] * steps.decode_sequences
            total += each / self.stages
        if steps.prefill_chunks and steps.decode_sequences:
            total -= min(own.prefill[0], decode[0]) / self.stages
        return float(total)
