"""A logits processor for `planner_cpu.py`: a request ends by EOS at its recorded length, which only this class knows.

Lengths come from the file that ``PLANNER_CPU_LENGTHS`` names, by the first two tokens of the prompt. Other requests are
left alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import replay_eos

EOS = replay_eos.EOS
ENV_LENGTHS = "PLANNER_CPU_LENGTHS"


class EndAtLength(replay_eos.EndAtLength):
    """`replay_eos.EndAtLength` with lengths from a file, since the engine is another process."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        found = json.loads(Path(os.environ[ENV_LENGTHS]).read_text(encoding="utf-8"))
        self.lengths = {(int(first), int(second)): int(length) for first, second, length in found}

    def _length(self, params: Any, prompt: list[int] | None, output: list[int]) -> tuple[int, list[int]] | None:
        known = tuple((prompt or [])[:2]) in self.lengths
        return super()._length(params, prompt, output) if known else None
