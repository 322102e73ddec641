"""What one worker has computed, counted on the host once per engine step.

A count is a plain addition in the process that runs the model, made where attention metadata is built, so it also
sees steps that replay a whole CUDA graph. The API server asks for the numbers through
:class:`vllm_swiftkv.worker.SwiftKVWorkerExtension`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class Counters:
    """Totals since the process started, warm-up steps included.

    Attributes:
        steps: engine steps that ran the model.
        head_tokens: tokens that the head computed, of prompts and of outputs.
        prompt_tokens: those of prompts.
        tail_rows: rows that the tail computed, padding of graphs not counted.
    """

    steps: int = 0
    head_tokens: int = 0
    prompt_tokens: int = 0
    tail_rows: int = 0

    def step(self, head_tokens: int, prompt_tokens: int, tail_rows: int) -> None:
        """Add one engine step."""
        self.steps += 1
        self.head_tokens += head_tokens
        self.prompt_tokens += prompt_tokens
        self.tail_rows += tail_rows

    def snapshot(self) -> dict[str, int]:
        """The totals by name: plain values, which cross process borders as msgpack."""
        return asdict(self)


COUNTERS = Counters()
"""This process's counters."""
