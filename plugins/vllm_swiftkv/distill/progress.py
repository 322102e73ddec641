"""What a distillation shows of its steps."""

from __future__ import annotations

from typing import Any

from vllm_suite.step_progress import StepProgress


class Progress(StepProgress):
    """Steps with their loss."""

    def step(self, entry: dict[str, Any]) -> None:
        """A step of the log was taken."""
        text = f"loss {entry['loss']:.4f} (kl {entry['kl']:.4f}, hidden {entry['mse']:.4f})"
        self.taken(entry["step"], text, f", {entry['tokens'] / entry['seconds']:.0f} tokens/s")
