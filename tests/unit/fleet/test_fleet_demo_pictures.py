"""The text demo's requests with pictures, and which checkpoints they are sent to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_suite.fleet.demo_pictures import demo_requests, pictures_of, takes_pictures
from vllm_suite.fleet.tiny import make_tiny_model
from vllm_suite.fleet.tiny_media import FAMILIES, write


def test_requests_with_pictures_lie_among_the_others() -> None:
    asked = demo_requests(32, 48, 20.0, seed=3)
    assert [request.index for request in asked] == [48, 49]
    assert [pictures_of([request]) for request in asked] == [1, 2]
    assert all(0 < request.arrival_s < 20 for request in asked)
    assert all(request.body["max_completion_tokens"] == 32 for request in asked)
    assert asked == demo_requests(32, 48, 20.0, seed=3)
    assert urls(asked).isdisjoint(urls(demo_requests(32, 48, 20.0, seed=1003)))


def urls(requests: Any) -> set[str]:
    parts = [part for request in requests for part in request.body["messages"][0]["content"]]
    return {part["image_url"]["url"] for part in parts if part["type"] == "image_url"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_that_sees_takes_pictures(tmp_path: Path, family: Any) -> None:
    pytest.importorskip("tokenizers")
    assert takes_pictures(str(write(family, tmp_path))) is (family != "qwen2_audio")


def test_others_take_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    assert not takes_pictures(str(make_tiny_model(tmp_path / "text")))
    assert not takes_pictures(str(tmp_path / "absent"))
    assert not takes_pictures("org/never-fetched")
    (tmp_path / "config.json").write_text("[")
    assert not takes_pictures(str(tmp_path))


def test_of_a_hub_name_the_fetched_copy_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    snapshot = tmp_path / "models--org--seeing" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"vision_config": {}}))
    refs = tmp_path / "models--org--seeing" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert takes_pictures("org/seeing")
