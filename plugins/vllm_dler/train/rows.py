"""Prompts and their right answers, from files, and the order in which a run takes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dler.train.config import DLERConfig
from vllm_dler.train.grading import TrainError

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One question. ``fields`` is the whole row of the file, for a judge of one's own."""

    prompt: Prompt
    answer: str
    fields: Mapping[str, Any]


def read_rows(paths: Sequence[Path], config: DLERConfig) -> list[Row]:
    """All rows of the files. Raises TrainError with file and row for one that lacks its prompt or answer."""
    return [_row(fields, origin, config) for path in paths for fields, origin in _raw(path)]


def split(rows: list[Row], held: int, seed: int) -> tuple[list[Row], list[Row]]:
    """``held`` rows drawn at random, taken out: (the rest in order, those). Raises TrainError where none is left."""
    import torch

    if held >= len(rows):
        raise TrainError(f"{len(rows)} rows cannot spare eval_rows {held}: give eval_data, or fewer eval_rows")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    out = set(order[:held])
    return [row for i, row in enumerate(rows) if i not in out], [rows[i] for i in order[:held]]


class Stream:
    """An endless order of the numbers below ``count``: pass after pass, each shuffled in its own way.

    ``position``, the numbers taken so far, is all its state.
    """

    def __init__(self, count: int, seed: int, position: int = 0) -> None:
        if count < 1:
            raise TrainError("there is no prompt to train on")
        self._count, self._seed, self.position = count, seed, position
        self._pass, self._order = -1, list[int]()

    def take(self, number: int) -> list[int]:
        """The next ``number`` of them."""
        import torch

        taken = []
        for _ in range(number):
            turn, index = divmod(self.position, self._count)
            if turn != self._pass:
                # Torch takes 32 bits of a seed on a CPU.
                random = torch.Generator().manual_seed((self._seed * 1_000_003 + turn) % 2**32)
                self._pass, self._order = turn, torch.randperm(self._count, generator=random).tolist()
            taken.append(self._order[index])
            self.position += 1
        return taken


def _row(fields: Mapping[str, Any], origin: str, config: DLERConfig) -> Row:
    for name in (config.prompt_field, config.answer_field):
        if fields.get(name) is None:
            raise TrainError(f"{origin} has no {name!r}: name the columns by prompt_field and answer_field")
    prompt, answer = fields[config.prompt_field], fields[config.answer_field]
    if isinstance(prompt, str):
        text = prompt + config.suffix
        if not config.chat:
            return Row(text, str(answer), fields)
        system = [] if config.system is None else [{"role": "system", "content": config.system}]
        return Row([*system, {"role": "user", "content": text}], str(answer), fields)
    messages = [dict(message) for message in prompt]
    if not messages or any({"role", "content"} - message.keys() for message in messages):
        raise TrainError(f"{origin}: {config.prompt_field!r} is neither a text nor a list of messages")
    return Row(messages, str(answer), fields)


def _raw(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    if path.is_dir() or path.suffix == ".parquet":
        import datasets

        try:
            table = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.Dataset.from_parquet(str(path))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise TrainError(f"{path} cannot be read as a dataset: {error}") from error
        if isinstance(table, datasets.DatasetDict):
            raise TrainError(f"{path} holds several splits ({', '.join(table)}): give the folder of one")
        yield from ((fields, f"{path}: row {i}") for i, fields in enumerate(table))
        return
    try:
        with path.open(encoding="utf-8") as lines:
            for i, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                fields = json.loads(line)
                if not isinstance(fields, dict):
                    raise TrainError(f"{path}: line {i} is no JSON object")
                yield fields, f"{path}: line {i}"
    except json.JSONDecodeError as error:
        raise TrainError(f"{path}: line {i} is no JSON: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"{path} cannot be read: {error}") from error
