"""What plugin epd sets for a role and a model, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_epd import options
from vllm_suite.catalog import NO_LOCAL_ENCODER, SelectionError
from vllm_suite.compat.settings import OPTIONS, Note, Setting, View
from vllm_suite.identity import Role

VISION = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
TEXT = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
ENCODER_DECODER = {"architectures": ["WhisperForConditionalGeneration"], "is_encoder_decoder": True}
SUITE_CONNECTOR = {"ec_connector": "SuiteECConnector", "ec_connector_module_path": "vllm_epd.connector"}


@pytest.fixture
def model(tmp_path: Path) -> Any:
    def make(config: dict[str, Any]) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return make


@pytest.fixture(autouse=True)
def no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NO_LOCAL_ENCODER.env, raising=False)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NO_LOCAL_ENCODER.env, "1")


def view(model: str, role: Role = "any", device: str = "cpu", **given: Any) -> View:
    unset: dict[str, Any] = dict.fromkeys(OPTIONS)
    unset |= {"model": model, "hf_config_path": None, "config_format": "auto", "limit_mm_per_prompt": {}}
    unset |= dict.fromkeys(("revision", "hf_token", "hf_overrides"))
    unset |= {"enable_mm_embeds": False, "language_model_only": False, "pipeline_parallel_size": 1}
    return View(role, device, SimpleNamespace(**unset | {"worker_cls": "auto"} | given))


def proposed(here: View) -> dict[str, Any]:
    return {item.option: item.value for item in options.propose(here) if isinstance(item, Setting)}


def ready(here: View) -> View:
    """The same view after its proposals were set, as plain values."""
    for option, value in proposed(here).items():
        if getattr(here.engine_args, option) in (None, {}, False):
            setattr(here.engine_args, option, value)
    return here


@pytest.mark.parametrize(
    ("role", "ec_role"),
    [("encode", "ec_producer"), ("prefill", "ec_consumer"), ("decode", "ec_consumer"), ("any", "ec_both")],
)
def test_the_connector_by_role(model: Any, role: Role, ec_role: str) -> None:
    here = view(model(VISION), role)
    settings = proposed(here)
    assert settings.pop("ec_transfer_config") == SUITE_CONNECTOR | {"ec_role": ec_role}
    manager = settings.pop("ec_manager_config", None)
    assert manager == {"encoder_cache_manager_cls": options.MANAGER}
    assert settings == ({"scheduler_cls": options.SCHEDULER} if role == "any" else {})
    options.check(ready(here))


@pytest.mark.parametrize("role", ["prefill", "decode", "any"])
def test_a_text_only_model_is_left_alone(model: Any, role: Role) -> None:
    [note] = options.propose(view(model(TEXT), role))
    assert isinstance(note, Note)
    assert "is a text-only model, nothing is set" in note.text
    [note] = options.propose(view(model(VISION), role, language_model_only=True))
    assert "--language-model-only is given" in str(note)


def test_an_unknown_architecture_is_judged_by_its_sections(model: Any) -> None:
    assert "ec_transfer_config" in proposed(view(model({"architectures": ["MineForAll"], "vision_config": {}})))
    assert not proposed(view(model({"architectures": ["MineForAll"]})))


def test_a_config_that_cannot_be_read_is_taken_for_a_multimodal_one() -> None:
    items = options.propose(view("/no/such/model", "prefill"))
    assert "cannot be read here" in str(items[-1])
    assert len(items) == 3


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_without_a_local_encoder(model: Any, alone: None, role: Role) -> None:
    settings = proposed(view(model(VISION), role))
    assert settings["limit_mm_per_prompt"] == {"image": 0, "video": 0, "audio": 0, "vision_chunk": 0}
    assert settings["enable_mm_embeds"] is True
    assert settings["ec_transfer_config"]["ec_connector_extra_config"] == {"suite": {"on_failure": "fail"}}
    options.check(ready(view(model(VISION), role)))


@pytest.mark.parametrize(
    ("config", "role", "text"),
    [
        (TEXT, "encode", "an instance of role encode needs a multimodal model, and .* is a text-only model"),
        (ENCODER_DECODER, "any", "is an encoder-decoder model"),
        (ENCODER_DECODER, "encode", "is an encoder-decoder model"),
    ],
)
def test_models_that_cannot_work(model: Any, config: dict[str, Any], role: Role, text: str) -> None:
    with pytest.raises(SelectionError, match=text):
        options.propose(view(model(config), role))


@pytest.mark.parametrize("role", ["encode", "any"])
def test_the_switch_is_refused_where_the_instance_has_to_encode(model: Any, alone: None, role: Role) -> None:
    with pytest.raises(SelectionError, match=f"an instance of role {role} has to encode"):
        options.propose(view(model(VISION), role))


def test_the_switch_needs_a_multimodal_model(model: Any, alone: None) -> None:
    with pytest.raises(SelectionError, match="--epd-no-local-encoder needs a multimodal model"):
        options.propose(view(model(TEXT), "prefill"))


def test_a_switch_that_is_neither_on_nor_off(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NO_LOCAL_ENCODER.env, "0")
    assert "limit_mm_per_prompt" not in proposed(view(model(VISION), "prefill"))
    monkeypatch.setenv(NO_LOCAL_ENCODER.env, "yes")
    with pytest.raises(SelectionError, match=r"'yes' is neither 1 .on. nor 0 .off."):
        options.propose(view(model(VISION), "prefill"))


CONSUMER = SUITE_CONNECTOR | {"ec_role": "ec_consumer"}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"limit_mm_per_prompt": {"image": 4}}, "yours names image 4; leave yours out"),
        ({"limit_mm_per_prompt": {"image": 0}}, "yours names only some kinds of input"),
        ({"limit_mm_per_prompt": {"image": {"width": 8}}}, "yours names image 999"),
        ({"ec_transfer_config": CONSUMER}, "on_failure to .fail."),
        ({"ec_transfer_config": SUITE_CONNECTOR | {"ec_role": "ec_both"}}, "needs ec_role ec_consumer"),
    ],
)
def test_the_users_options_that_contradict_the_switch(
    model: Any, alone: None, given: dict[str, Any], text: str
) -> None:
    with pytest.raises(SelectionError, match=text):
        options.check(ready(view(model(VISION), "prefill", **given)))


def test_embeddings_switched_off_contradict_the_switch(model: Any, alone: None) -> None:
    here = ready(view(model(VISION), "prefill"))
    here.engine_args.enable_mm_embeds = False
    with pytest.raises(SelectionError, match="leave no way to take media"):
        options.check(here)


def test_pipeline_stages_are_refused_for_the_suites_connector_only(model: Any) -> None:
    with pytest.raises(SelectionError, match="does not support pipeline parallelism"):
        options.check(ready(view(model(VISION), "prefill", pipeline_parallel_size=2)))
    mine = {"ec_connector": "ECExampleConnector", "ec_role": "ec_consumer"}
    options.check(ready(view(model(VISION), "prefill", pipeline_parallel_size=2, ec_transfer_config=mine)))


def test_an_encode_instance_must_be_a_producer_and_nothing_else(model: Any) -> None:
    mine = SUITE_CONNECTOR | {"ec_role": "ec_both"}
    with pytest.raises(SelectionError, match="role encode needs ec_role ec_producer"):
        options.check(ready(view(model(VISION), "encode", ec_transfer_config=mine)))


def test_the_v2_runner_cannot_encode_only_on_cpu(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(SelectionError, match="unset VLLM_USE_V2_MODEL_RUNNER"):
        options.check(ready(view(model(VISION), "encode")))
    options.check(ready(view(model(VISION), "encode", worker_cls="my.Worker")))
    options.check(ready(view(model(VISION), "encode", device="cuda")))
    options.check(ready(view(model(VISION), "prefill")))
