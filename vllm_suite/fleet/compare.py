"""Compares the answers of two replays and sums their times up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_suite.fleet.replay import Answer


def mismatches(answers: Sequence[Answer], expected: Sequence[Answer]) -> list[dict[str, Any]]:
    """Requests whose tokens differ or that failed on either side, with the first difference.

    `position` is the index of the first differing output token. Both replays must hold the same requests.
    """
    found: list[dict[str, Any]] = []
    for got, want in zip(answers, expected, strict=True):
        if got.index != want.index:
            raise ValueError(f"request {got.index} is compared with request {want.index}")
        same = (got.token_ids, got.prompt_tokens) == (want.token_ids, want.prompt_tokens)
        if same and not got.error and not want.error:
            continue
        pairs = zip(got.token_ids, want.token_ids, strict=False)
        shorter = min(len(got.token_ids), len(want.token_ids))
        found.append(
            {
                "index": got.index,
                "position": next((i for i, (a, b) in enumerate(pairs) if a != b), shorter),
                "token_ids": list(got.token_ids),
                "expected": list(want.token_ids),
                "prompt_tokens": [got.prompt_tokens, want.prompt_tokens],
                "error": got.error,
                "expected_error": want.error,
            }
        )
    return found


def quantile(values: Sequence[float], q: float) -> float | None:
    """The smallest value that at least a fraction `q` of all do not exceed; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    # ceil without floating-point surprises at whole numbers: 0.99 * 100 must give rank 99.
    rank = -int(-round(q * len(ordered), 9) // 1)
    return ordered[min(len(ordered), max(1, rank)) - 1]


def times(answers: Sequence[Answer]) -> dict[str, dict[str, float | None]]:
    """`ttft_ms` and `tpot_ms`, each with p50, p99 and mean over the requests that did not fail."""
    good = [answer for answer in answers if answer.error is None]
    columns = {
        "ttft_ms": [answer.ttft_ms for answer in good if answer.ttft_ms is not None],
        "tpot_ms": [answer.tpot_ms for answer in good if answer.tpot_ms is not None],
    }
    return {
        name: {
            "p50": _rounded(quantile(values, 0.5)),
            "p99": _rounded(quantile(values, 0.99)),
            "mean": _rounded(sum(values) / len(values)) if values else None,
        }
        for name, values in columns.items()
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
