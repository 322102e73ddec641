"""Which items a model encodes unit by unit, and one slice of such an item as vLLM's own processor would have made it.

A rule names, for a model class and a modality, the field with the pixels and the field that counts or sizes them.
There is a rule only where each unit's embeddings depend on that unit alone and lie one after the other in the item's
embeddings:

* InternVL, in transformers' layout and in its authors': tiles of a picture, the thumbnail among them, and frames of a
  film are rows of one batch of the encoder.
* Qwen2.5-VL, Qwen3-VL: attention stays within a temporal patch (two frames) of a film, positions are those
  of its height and width. A picture is one temporal patch.

Nothing is decoded, resized or cut here a second time: a slice is a run of rows of what the processor has made of the
whole item. So it is exact whatever the processor does, and with any of its versions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_suite.encoded import Slice


@dataclass(frozen=True)
class Rule:
    """The fields of an item: ``pixels`` begins with its units, ``size`` says how many they are.

    ``size`` holds one number, or with ``grid`` three: units, and height and width in rows of ``pixels``.
    """

    pixels: str
    size: str
    grid: bool = False


_INTERNVL = {
    "image": Rule("pixel_values", "image_num_patches"),
    "video": Rule("pixel_values_videos", "video_num_patches"),
}
_QWEN_VL = {"video": Rule("pixel_values_videos", "video_grid_thw", grid=True)}

RULES: Mapping[str, Mapping[str, Rule]] = {
    "InternVLForConditionalGeneration": _INTERNVL,
    "InternVLChatModel": {
        "image": Rule("pixel_values_flat", "image_num_patches"),
        "video": Rule("pixel_values_flat_video", "video_num_patches"),
    },
    "Qwen2_5_VLForConditionalGeneration": _QWEN_VL,
    "Qwen3VLForConditionalGeneration": _QWEN_VL,
}


def rules_for(model_config: Any) -> Mapping[str, Rule]:
    """Rules of a model by modality; empty where its items stay whole."""
    rules = dict(RULES.get(model_config.architecture, {}))
    multimodal = model_config.multimodal_config
    if multimodal is None or multimodal.mm_processor_cache_type == "shm":
        return {}  # processed items never come to the scheduler's process, where they are cut
    if multimodal.is_multimodal_pruning_enabled():
        rules.pop("video", None)  # which rows of a film are dropped depends on all of it
    return rules


def units_of(rule: Rule, data: Any) -> int | None:
    """Units of a processed item; None where its fields are not what the rule expects."""
    try:
        pixels, size = data[rule.pixels].data, data[rule.size].data
        numbers = [int(number) for number in size.reshape(-1).tolist()]
        rows = pixels.shape[0]
    except (KeyError, TypeError, AttributeError):
        return None
    if len(numbers) != (3 if rule.grid else 1) or min(numbers) < 1:
        return None
    per_unit = numbers[1] * numbers[2] if rule.grid else 1
    return numbers[0] if rows == numbers[0] * per_unit else None


def cut(feature: Any, rule: Rule, piece: Slice) -> Any | None:
    """A copy of a feature that holds one slice of it.

    Returns:
        None where the item has fewer units than slices, or is not as the rule expects.
    """
    data = feature.data
    units = units_of(rule, data) if data is not None else None
    if units is None or units < piece.count:
        return None
    start, stop = piece.bounds(units)
    pixels, size = data[rule.pixels], data[rule.size]
    per_unit = pixels.data.shape[0] // units
    # A view would travel to the workers with all that it is a view of.
    part = pixels.data[start * per_unit : stop * per_unit].clone()
    number = size.data.clone()
    number.view(-1)[0] = stop - start
    fields = {
        **data,
        rule.pixels: dataclasses.replace(pixels, data=part),
        rule.size: dataclasses.replace(size, data=number),
    }
    return dataclasses.replace(feature, data=type(data)(fields))
