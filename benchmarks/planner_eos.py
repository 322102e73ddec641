"""A logits processor for `planner_cpu.py`: a request ends by EOS at its recorded length, which only this class knows.

Lengths come from the file that ``PLANNER_CPU_LENGTHS`` names, by the first two tokens of the prompt. Other requests are
left alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

EOS = 1
ENV_LENGTHS = "PLANNER_CPU_LENGTHS"


class EndAtLength(LogitsProcessor):
    """Forbids EOS before a request's last token and forces it there."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        found = json.loads(Path(os.environ[ENV_LENGTHS]).read_text(encoding="utf-8"))
        self._lengths = {(int(first), int(second)): int(length) for first, second, length in found}
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
        first, second, *_ = [*(prompt or []), -1, -1]
        length = self._lengths.get((first, second))
        return None if length is None else (length, output)
