"""Which prompts of LLMServingSim's workloads begin alike: vLLM's prefix cache finds these tokens again.

A measured run's rows have lengths and times, and no text. vLLM's prefix cache is on by default, and ShareGPT's
conversations come in turns, each of which repeats the one before. What is repeated is read from the run's workload
where the data folder has it, and from the table below where it is one of the published ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

BLOCK = 16
"""Tokens of a block of vLLM's cache, by default and in these runs."""

Chains = tuple[tuple[int, ...], ...]
"""Of each request ids of the blocks its prompt begins with, as far as they are shared; equal ids are equal content."""

Overlap = tuple[int, int, int]
"""A request, an earlier one whose prompt begins alike, and how many blocks are equal."""

PUBLISHED: Mapping[str, tuple[Overlap, ...]] = {
    "05e48b32da530d4a3dd77f3d47c6fe694ac8308d611aa088e38bb10fba2b3b3a": (
        (47, 40, 28), (66, 35, 39), (68, 28, 22), (79, 17, 53), (88, 27, 20), (93, 82, 39), (117, 45, 24),
        (128, 63, 52), (139, 117, 62), (140, 76, 24), (152, 31, 2), (158, 107, 38), (173, 153, 28), (174, 38, 82),
        (177, 22, 30), (180, 61, 51), (183, 31, 19), (184, 151, 36), (188, 138, 45), (200, 109, 16), (209, 201, 37),
        (220, 146, 32), (223, 36, 50), (227, 226, 32), (235, 56, 52), (237, 207, 79), (265, 149, 37), (280, 147, 51),
        (281, 186, 51), (285, 165, 45), (287, 111, 28), (293, 163, 16),
    ),
    "4af54eb2f7ac12b0856a1668e367fc8a330acd37c4f6c3e336ae02229e21a8bb": (
        (47, 40, 30), (67, 35, 40), (70, 28, 22), (82, 17, 84), (91, 27, 20), (96, 85, 39), (122, 45, 26),
        (133, 64, 53), (146, 122, 67), (147, 78, 24), (159, 31, 2), (165, 112, 39), (180, 160, 29), (181, 38, 84),
        (185, 22, 31), (188, 62, 51), (189, 184, 16), (192, 31, 19), (193, 158, 36), (197, 145, 45), (209, 114, 16),
        (218, 210, 37), (229, 153, 32), (232, 36, 56), (236, 235, 32), (245, 57, 52), (247, 216, 79), (276, 156, 39),
        (291, 154, 53), (292, 195, 51), (296, 172, 46), (298, 116, 28),
    ),
}  # fmt: skip
"""By the SHA-256 of a workload file: `sharegpt-llama-3.1-8b-300-sps10` and `sharegpt-qwen3-32b-300-sps10`, which the
Qwen3-30B-A3B run has too. Counted with `overlaps` in casys-kaist/LLMServingSim at 5daddb2 (MIT); 19,520 and 20,448
tokens, which is what that simulator's own log says was found in its cache."""


def overlaps(workload: Path) -> tuple[Overlap, ...]:
    """Of a workload file with the token ids of each prompt (``input_tok_ids``).

    Raises:
        OSError, ValueError, KeyError: it cannot be read, or has no token ids.
    """
    seen: dict[tuple[int, ...], int] = {}
    found: list[Overlap] = []
    for number, line in enumerate(filter(str.strip, workload.read_text(encoding="utf-8").splitlines())):
        ids = json.loads(line)["input_tok_ids"]
        heads = [tuple(ids[:end]) for end in range(BLOCK, len(ids) + 1, BLOCK)]
        equal = next((at for at, head in enumerate(heads) if head not in seen), len(heads))
        if equal:
            found.append((number, seen[heads[equal - 1]], equal))
        for head in heads:
            seen.setdefault(head, number)
    return tuple(found)


def chains(found: Iterable[Overlap], requests: int) -> Chains:
    """Ids of blocks for each of so many requests, the first of a workload. Raises ValueError."""
    rows = sorted(each for each in found if each[0] < requests)
    needed = [0] * requests
    fresh, made, by_request = count(), list[tuple[int, ...]](), {number: (other, size) for number, other, size in rows}
    for number, other, size in rows:
        if not 0 <= other < number:
            raise ValueError(f"request {number} begins like {other}, which is no earlier one")
        needed[other], needed[number] = max(needed[other], size), max(needed[number], size)
    for number in range(requests):
        other, size = by_request.get(number, (0, 0))
        head = made[other][:size] if size else ()
        made.append((*head, *(next(fresh) for _ in range(needed[number] - len(head)))))
    return tuple(made)


def of_run(root: Path, meta: Mapping[str, Any], requests: int) -> Chains | None:
    """What is known of a run: from ``workloads/`` beside the runs, else from the published table; None for nothing.

    Args:
        root: the folder of the runs.
        meta: of the run, with the workload's ``dataset_path`` and ``dataset_hash``.

    Raises:
        OSError, ValueError, KeyError: see `overlaps`.
    """
    file = root / "workloads" / Path(str(meta.get("dataset_path", ""))).name
    if file.is_file():
        return chains(overlaps(file), requests)
    published = PUBLISHED.get(str(meta.get("dataset_hash", "")))
    return None if published is None else chains(published, requests)
