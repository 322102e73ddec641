"""What a training run shows of its steps."""

from __future__ import annotations

from typing import Any

from vllm_suite.step_progress import StepProgress


class Progress(StepProgress):
    """Steps with reward and length, the first one at once."""

    def __init__(self, steps: int, done: int, show: bool) -> None:
        super().__init__(steps, done, show, at_once=True)

    def step(self, entry: dict[str, Any]) -> None:
        """A step was taken."""
        self.taken(
            entry["step"],
            f"right in time {entry['right_in_time']:.1%}, {entry['length']:.1f} tokens, "
            f"entropy {entry['entropy']:.3f}, groups kept {entry['groups_kept']:.0%}",
        )
