"""Pictures, films and sounds of a workload, from what they are called to what they cost."""

from __future__ import annotations

import re

from vllm_suite.fleet.traces import TraceError
from vllm_suite.media.config import UnknownModel
from vllm_suite.media.families import Encoder
from vllm_suite.planner.workload import Item

_KIND = re.compile(r"(?:(?P<frames>\d+)x)?(?P<width>\d+)x(?P<height>\d+)|(?P<seconds>\d+(?:\.\d+)?)s")


def item_of(encoder: Encoder, kind: str, content: int | None = None) -> Item:
    """An item of a model with an encoder.

    Args:
        encoder: `Model.encoder`.
        kind: ``1920x1080`` for a picture, ``16x640x480`` for a film of 16 sampled frames, ``30s`` for sound.
        content: see `Item`.

    Raises:
        TraceError: `kind` is none of these, or the model does not take it.
    """
    found = _KIND.fullmatch(kind)
    if found is None or "0" in (found["frames"], found["width"], found["height"], found["seconds"]):
        raise TraceError(f"item {kind!r}: WIDTHxHEIGHT, FRAMESxWIDTHxHEIGHT or SECONDSs is expected, all above 0")
    if found["seconds"]:
        if encoder.sound is None:
            raise TraceError(f"item {kind}: the model takes no sound")
        cost = encoder.sound(float(found["seconds"]))
    else:
        width, height = int(found["width"]), int(found["height"])
        if found["frames"]:
            try:
                cost = encoder.video(int(found["frames"]), width, height)
            except UnknownModel as error:
                raise TraceError(f"item {kind}: {error}") from error
        elif encoder.image is None:
            raise TraceError(f"item {kind}: the model takes no images")
        else:
            cost = encoder.image(width, height)
    return Item(kind, cost.prompt_tokens, encoder.tower.flops(cost), content, cost.tiles)
