"""Which items of a request are cut into slices, and into how many."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_suite.router.encode.config import Slices
from vllm_suite.router.encode.parts import Item
from vllm_suite.router.members import Member


def counts(items: Sequence[Item], members: Sequence[Member], settings: Slices) -> list[int]:
    """Slices of each item, 1 for one that stays whole.

    An item is cut where it is more than half as long again as an encoder's even share of all of them: several items
    of about one size are spread whole, which costs no picture to be read twice.
    """
    result = [1] * len(items)
    if not settings.enabled:
        return result
    total = sum(item.tokens for item in items)
    for number, item in enumerate(items):
        # Members differ here only while a fleet is changed over to another version or model.
        if item.tokens < settings.min_tokens or not all(member.slices(item.modality) for member in members):
            continue
        free = sum(member.encode_tokens < item.tokens for member in members)
        if free < settings.min_encoders:
            continue
        fair = round(item.tokens * free / total)
        result[number] = max(1, min(fair, free, settings.max_slices, item.tokens // settings.slice_tokens))
    return result
