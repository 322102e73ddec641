"""What the state route says of an instance's encoder outputs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_epd.exporter import EpdExporter


class MultiModal:
    """What vLLM's own configuration says of media."""

    def __init__(self, pruned: bool, cache: str = "lru") -> None:
        self.pruned, self.mm_processor_cache_type = pruned, cache

    def is_multimodal_pruning_enabled(self) -> bool:
        return self.pruned


def facts(
    role: str | None,
    suite: dict[str, Any] | None = None,
    connector: str = "SuiteECConnector",
    architecture: str = "LlavaForConditionalGeneration",
    pruned: bool = False,
    cache: str = "lru",
) -> dict[str, Any]:
    extra = {"suite": suite} if suite is not None else {}
    transfer = SimpleNamespace(ec_connector=connector, ec_role=role, ec_connector_extra_config=extra)
    model = SimpleNamespace(architecture=architecture, multimodal_config=MultiModal(pruned, cache))
    config = SimpleNamespace(ec_transfer_config=transfer if role else None, model_config=model)
    return EpdExporter(SimpleNamespace(vllm_config=config)).facts()


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_EC_SIDE_CHANNEL_HOST", "VLLM_EC_SIDE_CHANNEL_PORT", "VLLM_NIXL_SIDE_CHANNEL_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("VLLM_HOST_IP", raising=False)


@pytest.mark.parametrize("role", ["ec_producer", "ec_both"])
def test_a_producer_says_where_items_are_claimed(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert facts(role) == {"ec": {"host": "127.0.0.1", "port": 0, "role": role}}
    monkeypatch.setenv("VLLM_EC_SIDE_CHANNEL_HOST", "10.0.0.7")
    monkeypatch.setenv("VLLM_EC_SIDE_CHANNEL_PORT", "5601")
    assert facts(role) == {"ec": {"host": "10.0.0.7", "port": 5601, "role": role}}
    assert facts(role, {"host": "10.0.0.8", "port": 7001})["ec"] == {"host": "10.0.0.8", "port": 7001, "role": role}


def test_a_consumer_serves_nothing_and_others_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_EC_SIDE_CHANNEL_PORT", "5601")
    assert facts("ec_consumer") == {"ec": {"host": "", "port": 0, "role": "ec_consumer"}}
    assert facts("ec_producer", connector="ECExampleConnector") == {}
    assert facts(None) == {}


def test_an_instance_without_an_encoder_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SUITE_EPD_NO_LOCAL_ENCODER", "1")
    assert facts("ec_consumer") == {"ec": {"host": "", "port": 0, "role": "ec_consumer", "encodes": False}}


def test_an_encoder_says_of_what_it_makes_slices() -> None:
    internvl, qwen = "InternVLForConditionalGeneration", "Qwen3VLForConditionalGeneration"
    assert facts("ec_producer", architecture=internvl)["ec"]["slices"] == ["image", "video"]
    assert facts("ec_producer", architecture=qwen)["ec"]["slices"] == ["video"]
    # Which rows of a film are dropped depends on all of it.
    assert "slices" not in facts("ec_producer", architecture=qwen, pruned=True)["ec"]
    # Processed items go past the process that cuts them.
    assert "slices" not in facts("ec_producer", architecture=internvl, cache="shm")["ec"]
    # An instance that computes prompts too would read a whole item where a slice lies.
    assert "slices" not in facts("ec_both", architecture=internvl)["ec"]
    assert "slices" not in facts("ec_consumer", architecture=internvl)["ec"]
