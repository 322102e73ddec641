"""A logits processor for `replay_cpu.py`: a request ends by EOS at its recorded length, which only this class knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

EOS = 1
LENGTHS: dict[tuple[int, ...], int] = {}
"""First two tokens of a prompt -> output tokens, the EOS among them."""


class EndAtLength(LogitsProcessor):
    """Forbids EOS before a request's last token and forces it there.

    `lengths`: see `LENGTHS`, which this process fills; a subclass may have others. A request that is not in it fails.
    """

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self.lengths: Mapping[tuple[int, ...], int] = LENGTHS
        self._rows: dict[int, tuple[int, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, self._length)

    def apply(self, logits: Any) -> Any:
        ending = [row for row, (length, output) in self._rows.items() if len(output) >= length - 1]
        logits[:, EOS] = -float("inf")
        if ending:
            logits[ending] = -float("inf")
            logits[ending, EOS] = 0.0
        return logits

    def _length(self, params: Any, prompt: list[int] | None, output: list[int]) -> tuple[int, list[int]] | None:
        """Tokens of a request and its output so far; None for one that is left alone."""
        return self.lengths[tuple((prompt or [])[:2])], output
