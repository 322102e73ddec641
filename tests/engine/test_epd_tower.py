"""What an instance of each kind holds in memory, counted in the running engines and in the checkpoint."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from child import scheduler
from epd_engine import EpdEngine, Spec, engines, references, runner, without_media

from vllm_suite.fleet.pictures_parts import image_part, text_part
from vllm_suite.fleet.tiny_media import write

FAMILY = "qwen2_5_vl"
QUESTION = text_part("What is it?")
PICTURE = image_part(112, 112, 7, uuid="s-tower")
ALONE = {"VLLM_SUITE_EPD_NO_LOCAL_ENCODER": "1"}


@dataclass(frozen=True)
class Held:
    """Parameters in memory by half of the model, the bytes of all of them, and the KV cache."""

    tower: int
    language: int
    weight_bytes: int
    kv_tensors: int
    kv_bytes: int
    kv_groups: int


def plugged(name: str, model: Path, role: str, **env: str) -> Spec:
    """An engine that is told nothing but the plugin and its role."""
    return Spec(name, model, "mono", env={"VLLM_SUITE_PLUGINS": "epd", "VLLM_SUITE_ROLE": role, **env})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A vocabulary that vLLM does not pad, so that parameters can be compared to the last one.
    return write(FAMILY, tmp_path_factory.mktemp("model") / FAMILY, vocab_size=576)


@pytest.fixture(scope="module")
def saved(model: Path) -> dict[str, int]:
    """Parameters of the checkpoint, by half."""
    sizes = {"tower": 0, "language": 0}
    for file in model.glob("*.safetensors"):
        for name, shape in _shapes(file):
            sizes["tower" if "visual" in name else "language"] += math.prod(shape)
    assert min(sizes.values()) > 100_000
    return sizes


@pytest.fixture(scope="module")
def trio(model: Path) -> Iterator[dict[str, EpdEngine]]:
    specs = (
        plugged("e", model, "encode"),
        plugged("pd", model, "decode", **ALONE),
        Spec("whole", model, "mono"),
    )
    with engines(*specs) as started:
        yield {engine.spec.name: engine for engine in started}


def test_the_whole_model_is_what_the_checkpoint_holds(trio: dict[str, EpdEngine], saved: dict[str, int]) -> None:
    held = trio["whole"].call(_held)
    assert (held.tower, held.language) == (saved["tower"], saved["language"])
    assert held.weight_bytes == 4 * sum(saved.values())
    assert held.kv_bytes > 0
    assert held.kv_groups == 1


def test_an_encoder_holds_the_tower_and_no_kv_cache(trio: dict[str, EpdEngine], saved: dict[str, int]) -> None:
    held = trio["e"].call(_held)
    assert (held.tower, held.language) == (saved["tower"], 0)
    assert held.weight_bytes == 4 * saved["tower"]
    assert (held.kv_tensors, held.kv_bytes, held.kv_groups) == (0, 0, 0)


def test_a_consumer_without_an_encoder_holds_no_tower(trio: dict[str, EpdEngine], saved: dict[str, int]) -> None:
    held = trio["pd"].call(_held)
    assert (held.tower, held.language) == (0, saved["language"])
    assert held.weight_bytes == 4 * saved["language"]
    assert held.kv_bytes == trio["whole"].call(_held).kv_bytes


def test_the_two_answer_as_the_whole(trio: dict[str, EpdEngine]) -> None:
    parts = [PICTURE, QUESTION]
    ec = trio["e"].encode(parts)
    answer = trio["pd"].ask(without_media(FAMILY, parts, ec), ec=references(ec))
    assert answer.said() == trio["whole"].ask(parts).said()


def test_pixels_are_refused_by_name_where_nothing_can_encode_them(trio: dict[str, EpdEngine]) -> None:
    with pytest.raises(RuntimeError, match=r"At most 0 image\(s\) may be provided in one prompt"):
        trio["pd"].ask([PICTURE, QUESTION])
    assert len(trio["pd"].ask([QUESTION]).tokens) == 8


def test_an_item_that_cannot_be_had_fails_its_request_and_no_other(trio: dict[str, EpdEngine]) -> None:
    lost = {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 8, 8]}, "uuid": "s-lost"}
    answer = trio["pd"].ask([lost, QUESTION])
    assert (answer.tokens, answer.finish_reason) == ([], "error")
    assert len(trio["pd"].ask([QUESTION]).tokens) == 8


def _shapes(file: Path) -> Iterator[tuple[str, list[int]]]:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
    yield from ((name, entry["shape"]) for name, entry in header.items() if name != "__metadata__")


# --- in the child ---


def _held(llm: Any) -> Held:
    model = runner(llm).model
    weights = {
        f"{prefix}.{name}": _elements(module, weight)
        for prefix, module in model.named_modules()
        for name, weight in module.named_parameters(recurse=False)
    }
    caches = [tensor for tensor in runner(llm).kv_caches if tensor is not None]
    return Held(
        tower=sum(count for name, count in weights.items() if name.startswith("visual")),
        language=sum(count for name, count in weights.items() if not name.startswith("visual")),
        weight_bytes=sum(weights.values()) * 4,
        kv_tensors=len(caches),
        kv_bytes=sum(tensor.numel() * tensor.element_size() for tensor in caches),
        kv_groups=len(scheduler(llm).kv_cache_config.kv_cache_groups),
    )


def _elements(module: Any, weight: Any) -> int:
    """Elements in memory. Those of a half that was left out are on torch's meta device and have none."""
    if weight.is_meta:
        return 0
    assert weight.element_size() == 4
    if weight.numel() == 0:  # oneDNN has taken the weight into a layout of its own
        assert hasattr(module, "cpu_linear")
        return int(module.output_size_per_partition * module.input_size_per_partition)
    return int(weight.numel())
