"""The suite's judges as verl and OpenRLHF call a reward function. Needs neither; the emitted settings name it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from vllm_dler.train.grading import Judge, make_judge

_judge = lru_cache(maxsize=None)(make_judge)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    *,
    judge: str = "boxed",
    think_end: str | None = "</think>",
    **_: Any,
) -> float:
    """verl's ``reward.custom_reward_function``: the score of one response."""
    chosen: Judge = _judge(judge, think_end)
    return chosen(solution_str, ground_truth, extra_info or {})


def openrlhf_reward(judge: str, think_end: str | None) -> Callable[..., dict[str, Any]]:
    """A ``reward_func`` for ``--reward.remote_url FILE.py`` of OpenRLHF.

    It gets prompt and response as one text (special tokens included), and the prompt to cut off it.
    """
    import torch

    chosen = make_judge(judge, think_end)

    def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str], **_: Any) -> dict[str, Any]:
        scores = [
            # The tokenizer may have changed the prompt's spelling; then the mark that ends the reasoning bounds it.
            chosen(query.removeprefix(prompt), str(label), {})
            for query, prompt, label in zip(queries, prompts, labels, strict=True)
        ]
        return {"rewards": torch.tensor(scores), "scores": torch.tensor(scores), "extra_logs": {}}

    return reward_func
