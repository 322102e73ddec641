"""Training documents: conversations, prompts with completions, and plain texts, from JSONL or saved datasets.

A document becomes text and the spans of it that the student is to learn: what the assistant says of a conversation,
the completion of a prompt, all of a plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_swiftkv.families import SwiftKVError

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Document:
    """A document before tokenisation.

    Attributes:
        text: all of it; for a conversation as the chat template renders it.
        learn: spans of characters, (start, end), to learn.
        whole: the text holds its own special tokens already, and no end of text follows it.
        splits: where it is too long, the rest is a document too; else the rest is left out.
        where: file and line, for messages.
        messages: the conversation, where the template itself marks what to learn.
    """

    text: str
    learn: tuple[tuple[int, int], ...]
    whole: bool
    splits: bool
    where: str
    messages: tuple[dict[str, Any], ...] = ()


def read_documents(paths: Iterable[Path], tokenizer: Any) -> Iterator[Document]:
    """The documents of files and folders, in order. Raises SwiftKVError naming file and line of a bad one."""
    for path in paths:
        rows = _dataset(path) if path.is_dir() else _jsonl(path)
        for where, row in rows:
            try:
                yield _document(row, where, tokenizer)
            except _BadRow as error:
                raise SwiftKVError(f"{where}: {error}") from error


class _BadRow(Exception):
    pass


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    yield f"{path}:{number}", json.loads(line)
                except ValueError as error:
                    raise SwiftKVError(f"{path}:{number}: no JSON: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SwiftKVError(f"{path} cannot be read: {error}") from error


def _dataset(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise SwiftKVError(f"{path} is a folder: saved datasets need `pip install 'vllm-suite[train]'`") from None
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise SwiftKVError(f"{path} is no dataset that save_to_disk wrote: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        raise SwiftKVError(f"{path} holds the splits {', '.join(loaded)}: give the folder of one")
    for number, row in enumerate(loaded):
        yield f"{path} row {number}", row


def _document(row: Any, where: str, tokenizer: Any) -> Document:
    if not isinstance(row, dict):
        raise _BadRow("an object is expected")
    if row.get("messages") is not None:
        return _conversation(row["messages"], where, tokenizer)
    if row.get("text") is not None:
        text = _string(row, "text")
        return Document(text, ((0, len(text)),), whole=False, splits=True, where=where)
    if row.get("prompt") is not None or row.get("completion") is not None:
        prompt, completion = _string(row, "prompt"), _string(row, "completion")
        text = prompt + completion
        return Document(text, ((len(prompt), len(text)),), whole=False, splits=False, where=where)
    found = ", ".join(sorted(row)) or "none"
    raise _BadRow(f'the keys "messages", "text", or "prompt" and "completion" are expected; found: {found}')


def _string(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value:
        raise _BadRow(f"{key} must be a string that is not empty")
    return value


def _conversation(messages: Any, where: str, tokenizer: Any) -> Document:
    if not isinstance(messages, list) or not messages:
        raise _BadRow("messages must be a list that is not empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _BadRow(f"messages[{i}] must be an object with a role")
        if not isinstance(message.get("content"), str):
            raise _BadRow(f"messages[{i}].content must be a string")
    if not any(message["role"] == "assistant" for message in messages):
        raise _BadRow("no message has the role assistant: there is nothing to learn")
    if not tokenizer.chat_template:
        raise SwiftKVError("the tokenizer has no chat template: give one with --chat-template, or prompts as text")
    if _MARKED.search(tokenizer.chat_template):
        return Document("", (), whole=True, splits=False, where=where, messages=tuple(messages))
    text, learn = _render(messages, tokenizer)
    return Document(text, learn, whole=True, splits=False, where=where)


def _render(messages: list[dict[str, Any]], tokenizer: Any) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The rendered conversation and the spans that each assistant message adds to the prompt before it."""

    def rendered(upto: int, prompt: bool) -> str:
        try:
            text = tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=prompt)
        # A template raises what it likes, for instance where roles do not alternate.
        except Exception as error:
            raise _BadRow(f"the chat template refuses the messages: {error}") from error
        return str(text)

    whole, learn = rendered(len(messages), False), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, end = rendered(i, True) if i else "", rendered(i + 1, False)
        if not (end.startswith(start) and whole.startswith(end)):
            raise _BadRow(
                f"the chat template renders messages[{i}] differently inside a longer conversation, so what the "
                "assistant says cannot be told from the rest; give a template with {% generation %} marks by "
                "--chat-template, or one conversation per reply"
            )
        learn.append((len(start), len(end)))
    return whole, tuple(learn)
