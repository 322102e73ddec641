"""Requests with pictures, for the demos and benchmarks, and whether a checkpoint takes any."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vllm_suite.fleet.demo_spec import SERVED_NAME
from vllm_suite.fleet.pictures_parts import Part, image_part, text_part, user_message
from vllm_suite.fleet.replay import Request, greedy

# Of the pictures in the text demo's requests, in pixels: one alone, then two together.
SHOWN = (((224, 224),), ((336, 224), (112, 280)))
_WORDS = ("what", "is", "in", "this", "and", "where", "how", "many", "red", "lines", "left", "of", "it", "then")
_IMAGE_WORDS = ("vision", "visual", "image", "img")


def takes_pictures(model: str) -> bool:
    """Whether the checkpoint's `config.json` speaks of pictures; False where there is none to read.

    `model` is a folder or a hub name; of the latter the copy is read that an engine of this machine has fetched.
    """
    path = Path(model) / "config.json"
    try:
        if not path.is_file():
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(model, "config.json")
            if not isinstance(found, str):
                return False
            path = Path(found)
        keys = list(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # no such name, or no such file; the engines have judged it already
        return False
    return any(word in key for key in keys for word in _IMAGE_WORDS)


def demo_requests(max_tokens: int, first_index: int, duration_s: float, seed: int) -> list[Request]:
    """The text demo's requests with pictures, spread over its duration, so that text is around each of them."""
    draw = random.Random(f"pictures:{seed}")
    requests: list[Request] = []
    for number, sizes in enumerate(SHOWN):
        parts = [image_part(*size, seed + 10 * number + place) for place, size in enumerate(sizes)]
        asked = picture_request(max_tokens, first_index + number, parts, draw)
        requests.append(replace(asked, arrival_s=duration_s * (number + 1) / (len(SHOWN) + 1)))
    return requests


def picture_request(max_tokens: int, index: int, pictures: Sequence[Part], draw: random.Random) -> Request:
    """Words before, between and after the pictures, so that a swapped pair or a shifted place shows."""
    parts = [text_part(_words(draw))]
    for picture in pictures:
        parts += [picture, text_part(_words(draw))]
    body = {
        **greedy(SERVED_NAME),
        "messages": user_message(parts),
        "max_completion_tokens": max_tokens,
    }
    return Request(index, 0.25 * max(0, index), "/v1/chat/completions", body)


def pictures_of(requests: Sequence[Request]) -> int:
    """Media parts in the requests."""
    return sum(
        part["type"] != "text"
        for request in requests
        for message in request.body.get("messages", ())
        if isinstance(message["content"], list)
        for part in message["content"]
    )


def _words(draw: random.Random) -> str:
    return " ".join(draw.choices(_WORDS, k=draw.randint(2, 9)))
