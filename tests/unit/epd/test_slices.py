"""Slices of processed items, of vLLM's own fields: nothing is lost, nothing comes twice, and the rest stays whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.epd.test_exporter import MultiModal
from vllm_epd.cuts import Cuts
from vllm_epd.messages import GaveUp
from vllm_epd.stats import SuiteECStats
from vllm_suite.compat.slices import RULES, cut, rules_for, units_of
from vllm_suite.encoded import Slice, slice_identifier

INTERNVL, QWEN = "InternVLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"


def feature(fields: dict[str, torch.Tensor], modality: str = "image", identifier: str = "i", rows: int = 64) -> Any:
    from vllm.multimodal.inputs import (
        MultiModalBatchedField,
        MultiModalFeatureSpec,
        MultiModalFieldElem,
        MultiModalKwargsItem,
        PlaceholderRange,
    )

    elements = {key: MultiModalFieldElem(data=value, field=MultiModalBatchedField()) for key, value in fields.items()}
    place = PlaceholderRange(offset=3, length=rows)
    return MultiModalFeatureSpec(MultiModalKwargsItem(elements), modality, identifier, place, "hash")


def tiles(count: int) -> dict[str, torch.Tensor]:
    pixels = torch.arange(count * 12, dtype=torch.float32).view(count, 3, 2, 2)
    return {"pixel_values": pixels, "image_num_patches": torch.tensor(count), "image_token_id": torch.tensor(7)}


def film(t: int, h: int, w: int) -> dict[str, torch.Tensor]:
    pixels = torch.arange(t * h * w * 4, dtype=torch.float32).view(t * h * w, 4)
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([t, h, w]), "timestamps": torch.arange(t)}


@settings(deadline=None)
@given(units=st.integers(1, 40), count=st.integers(2, 16))
def test_tiles_of_slices_are_those_of_the_item(units: int, count: int) -> None:
    whole = feature(tiles(units))
    before = whole.data["pixel_values"].data.clone()
    rule = RULES[INTERNVL]["image"]
    parts = [cut(whole, rule, Slice("i", index, count)) for index in range(count)]
    if units < count:
        assert parts == [None] * count
        return
    numbers = [int(part.data["image_num_patches"].data) for part in parts]
    assert sum(numbers) == units
    assert [len(part.data["pixel_values"].data) for part in parts] == numbers
    assert torch.equal(torch.cat([part.data["pixel_values"].data for part in parts]), before)
    # The item itself, which vLLM's cache may hold, stays as it was.
    assert torch.equal(whole.data["pixel_values"].data, before)
    assert int(whole.data["image_num_patches"].data) == units
    for part in parts:
        assert part.data["pixel_values"].data.untyped_storage().nbytes() < before.untyped_storage().nbytes()
        assert part.data["image_token_id"] is whole.data["image_token_id"]
        assert (part.identifier, part.mm_position, part.mm_hash) == ("i", whole.mm_position, "hash")


@settings(deadline=None)
@given(t=st.integers(1, 12), h=st.integers(1, 4), w=st.integers(1, 4), count=st.integers(2, 5))
def test_frames_of_slices_are_those_of_the_film(t: int, h: int, w: int, count: int) -> None:
    whole = feature(film(t, h, w), "video")
    rule = RULES[QWEN]["video"]
    parts = [cut(whole, rule, Slice("i", index, count)) for index in range(count)]
    if t < count:
        assert parts == [None] * count
        return
    grids = [part.data["video_grid_thw"].data.tolist() for part in parts]
    assert [grid[1:] for grid in grids] == [[h, w]] * count
    assert sum(grid[0] for grid in grids) == t
    assert [len(part.data["pixel_values_videos"].data) for part in parts] == [grid[0] * h * w for grid in grids]
    joined = torch.cat([part.data["pixel_values_videos"].data for part in parts])
    assert torch.equal(joined, whole.data["pixel_values_videos"].data)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pixel_values": torch.zeros(4, 3)},
        {"pixel_values": torch.zeros(4, 3), "image_num_patches": torch.tensor(5)},
        {"pixel_values": torch.zeros(4, 3), "image_num_patches": torch.tensor([2, 2])},
        {"pixel_values": torch.zeros(0, 3), "image_num_patches": torch.tensor(0)},
        {"image_embeds": torch.zeros(4, 3), "image_num_patches": torch.tensor(4)},
    ],
)
def test_other_fields_than_the_rule_expects(fields: dict[str, torch.Tensor]) -> None:
    assert units_of(RULES[INTERNVL]["image"], feature(fields).data) is None
    assert cut(feature(fields), RULES[INTERNVL]["image"], Slice("i", 0, 2)) is None


def test_a_grid_that_does_not_fit_its_pixels() -> None:
    fields = film(4, 2, 2) | {"video_grid_thw": torch.tensor([4, 2, 3])}
    assert units_of(RULES[QWEN]["video"], feature(fields, "video").data) is None


@pytest.mark.parametrize("name", ["LlavaOnevisionForConditionalGeneration", "LlavaForConditionalGeneration", "Gemma3"])
def test_families_whose_items_stay_whole(name: str) -> None:
    assert not rules_for(SimpleNamespace(architecture=name, multimodal_config=MultiModal(pruned=False)))


class Engine:
    """Cuts as the scheduler's half has them, with what they tell."""

    def __init__(self, architecture: str = INTERNVL) -> None:
        self.stats = SuiteECStats()
        self.told: list[GaveUp] = []
        model = SimpleNamespace(architecture=architecture, multimodal_config=MultiModal(pruned=False))
        self.cuts = Cuts(model, self.stats, self.told.append)

    def apply(self, features: list[Any], slices: Any, kept: tuple[str, ...] = ()) -> Any:
        request = SimpleNamespace(
            request_id="r",
            ec_transfer_params={"suite_encode_only": True, "suite_slices": slices},
            mm_features=features,
            get_num_encoder_embeds=lambda index: features[index].mm_position.length,
        )
        self.cuts.apply(request, lambda identifier: identifier in kept)
        return request

    def describe(self, *names: str) -> dict[str, Any]:
        items: dict[str, Any] = {name: {"metadata": {"image_grid_thw": [1]}} for name in names}
        self.cuts.describe("r", items)
        return items

    def counted(self) -> dict[str, float]:
        counts: dict[str, float] = self.stats.data["counts"].get("slices", {})
        return counts


def named(index: int, count: int, of: str = "whole") -> tuple[str, dict[str, Any]]:
    return slice_identifier(of, index, count), {"of": of, "index": index, "count": count}


def test_only_what_is_named_is_cut() -> None:
    engine = Engine()
    name, piece = named(1, 3)
    features = [feature(tiles(7), identifier=name, rows=112), feature(tiles(4), identifier="s-other")]
    other = features[1]
    request = engine.apply(features, {name: piece})
    assert int(request.mm_features[0].data["image_num_patches"].data) == 2
    assert request.mm_features[1] is other
    said = engine.describe(name, "s-other")
    assert said[name] == {"metadata": {}, "suite_slice": {**piece, "rows": 112}}
    assert said["s-other"] == {"metadata": {"image_grid_thw": [1]}}
    assert engine.counted() == {"cut": 1}
    assert not engine.told
    assert "suite_slice" not in engine.describe(name)[name]


@pytest.mark.parametrize("few", [feature, None], ids=["one tile", "no data"])
def test_an_item_that_cannot_be_cut_gets_its_own_name(few: Any) -> None:
    engine = Engine()
    name, piece = named(0, 2)
    item = feature(tiles(1), identifier=name)
    if few is None:
        item.data = None
    request = engine.apply([item], {name: piece})
    assert request.mm_features[0].identifier == "whole"
    assert engine.told == [GaveUp((name,))]
    assert engine.counted() == {"whole": 1}
    assert engine.describe("whole") == {"whole": {"metadata": {"image_grid_thw": [1]}}}


def test_a_slice_that_is_stored_needs_no_data() -> None:
    engine = Engine()
    name, piece = named(0, 2)
    item = feature(tiles(4), identifier=name, rows=64)
    item.data = None
    request = engine.apply([item], {name: piece}, kept=(name,))
    assert request.mm_features[0].identifier == name
    assert engine.describe(name)[name]["suite_slice"]["rows"] == 64


def test_a_family_without_a_rule() -> None:
    engine = Engine(QWEN)
    name, piece = named(0, 2)
    assert engine.apply([feature(tiles(4), identifier=name)], {name: piece}).mm_features[0].identifier == "whole"


@pytest.mark.parametrize(
    "slices",
    [
        None,
        7,
        [],
        {"x": 7},
        {"x": {"of": "whole", "index": 0}},
        {named(0, 2)[0]: {"of": "whole", "index": 1, "count": 2}},  # another slice's name
        {named(0, 2)[0]: {"of": "other", "index": 0, "count": 2}},
        {named(2, 2)[0]: {"of": "whole", "index": 2, "count": 2}},
        {named(0, 1)[0]: {"of": "whole", "index": 0, "count": 1}},
        {named(0, 99)[0]: {"of": "whole", "index": 0, "count": 99}},
        {named(0, 2)[0]: {"of": "whole", "index": 0, "count": 2, "rows": -1}},
    ],
)
def test_words_that_name_no_slice_cut_nothing(slices: Any) -> None:
    engine = Engine()
    names = list(slices) if isinstance(slices, dict) else ["x"]
    item = feature(tiles(200), identifier=names[0])
    assert engine.apply([item], slices).mm_features == [item]
    assert not engine.counted()
    assert "suite_slice" not in engine.describe(names[0])[names[0]]


def test_a_request_that_is_given_up_leaves_nothing() -> None:
    engine = Engine()
    name, piece = named(0, 2)
    engine.apply([feature(tiles(4), identifier=name)], {name: piece})
    engine.cuts.forget("r")
    assert not engine.cuts._made
