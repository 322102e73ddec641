"""Proposals of the plugins, and what happens where the user or another plugin wants something else."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_suite.catalog import SelectionError, landed_names
from vllm_suite.compat import settings
from vllm_suite.compat.settings import OPTIONS, PROPOSALS, Note, Setting, View, apply, propose
from vllm_suite.identity import ROLES, Role


def view(role: Role = "any", device: str = "cpu", **given: Any) -> View:
    unset: dict[str, Any] = dict.fromkeys(OPTIONS) | {"kv_sharing_fast_prefill": False, "additional_config": {}}
    unset |= {"model": "/no/such/model", "hf_config_path": None, "config_format": "auto", "worker_extension_cls": ""}
    unset |= dict.fromkeys(("revision", "hf_token", "hf_overrides", "speculative_config"))
    unset |= {"language_model_only": False, "pipeline_parallel_size": 1, "worker_cls": "auto"}
    unset |= {"limit_mm_per_prompt": {}, "enable_mm_embeds": False}
    return View(role, device, SimpleNamespace(**unset | given))


def test_every_landed_plugin_has_an_entry_that_stays_within_the_options() -> None:
    for name in landed_names():
        for role in ROLES:
            proposals = PROPOSALS[name](view(role))
            assert {item.option for item in proposals if isinstance(item, Setting)} <= set(OPTIONS)


def test_plugins_that_want_the_same_are_both_named() -> None:
    found = {setting.option: setting for setting in propose(["disagg", "epd", "dler"], view("any"))}
    assert found["scheduler_cls"].value == "vllm_suite.compat.scheduler.make_scheduler"
    assert found["scheduler_cls"].why == "epd, requests that only encode; dler, boost 0.9"


@pytest.mark.parametrize(
    ("role", "kv_role"), [("prefill", "kv_producer"), ("decode", "kv_consumer"), ("any", "kv_both")]
)
def test_disagg_by_role(role: Role, kv_role: str) -> None:
    [setting] = propose(["disagg"], view(role))
    assert setting.option == "kv_transfer_config"
    assert setting.value == {
        "kv_connector": "SuiteNixlConnector",
        "kv_connector_module_path": "vllm_disagg.connector",
        "kv_role": kv_role,
        "kv_load_failure_policy": "recompute",
        "kv_buffer_device": "cpu",
    }


def test_the_buffer_device_is_left_to_vllm_on_a_gpu_and_an_encoder_has_no_connector() -> None:
    [setting] = propose(["disagg"], view("any", "cuda"))
    assert "kv_buffer_device" not in setting.value
    assert propose(["disagg"], view("encode")) == []


def test_what_the_user_gave_stays() -> None:
    mine = object()
    here = view(kv_transfer_config=mine)
    applied = apply(["disagg"], here)
    assert here.engine_args.kv_transfer_config is mine
    assert applied.set == ()
    assert str(applied) == "kept your --kv-transfer-config"


def proposals(monkeypatch: pytest.MonkeyPatch, **table: Setting) -> None:
    monkeypatch.setattr(settings, "PROPOSALS", {name: lambda _, s=s: [s] for name, s in table.items()})


def test_two_plugins_share_additional_config_and_the_line_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    proposals(
        monkeypatch,
        a=Setting("additional_config", {"x": 1}, "a wants x"),
        b=Setting("additional_config", {"y": 2}, "b wants y"),
    )
    here = view()
    applied = apply(["a", "b"], here)
    assert here.engine_args.additional_config == {"x": 1, "y": 2}
    assert str(applied) == """set --additional-config '{"x": 1, "y": 2}' (a wants x; b wants y)"""


@pytest.mark.parametrize(
    ("option", "one", "two"), [("additional_config", {"x": 1}, {"x": 2}), ("scheduler_cls", "m.A", "m.B")]
)
def test_two_plugins_that_disagree_are_refused(
    monkeypatch: pytest.MonkeyPatch, option: str, one: Any, two: Any
) -> None:
    proposals(monkeypatch, a=Setting(option, one, "a"), b=Setting(option, two, "b"))
    with pytest.raises(SelectionError, match="different values of --"):
        propose(["a", "b"], view())


def test_a_flag_that_the_user_set_to_true_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    proposals(monkeypatch, a=Setting("kv_sharing_fast_prefill", True, "a"))
    here = view()
    apply(["a"], here)
    assert here.engine_args.kv_sharing_fast_prefill is True
    assert apply(["a"], view(kv_sharing_fast_prefill=True)).set == ()


def test_the_encoder_cache_managers_config_counts_as_given_where_it_names_a_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.config import EncoderCacheManagerConfig

    proposals(monkeypatch, a=Setting("ec_manager_config", {"encoder_cache_manager_cls": "a.A"}, "a"))
    here = view(ec_manager_config=EncoderCacheManagerConfig())
    apply(["a"], here)
    assert here.engine_args.ec_manager_config.encoder_cache_manager_cls == "a.A"
    here = view(ec_manager_config=EncoderCacheManagerConfig(encoder_cache_manager_cls="my.Manager"))
    assert str(apply(["a"], here)) == "kept your --ec-manager-config"
    assert here.engine_args.ec_manager_config.encoder_cache_manager_cls == "my.Manager"


def test_a_list_is_added_to_and_a_note_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    proposals(
        monkeypatch, a=Setting("logits_processors", ["a:A"], "a"), b=Setting("logits_processors", ["b:B", "mine"], "b")
    )
    monkeypatch.setitem(settings.PROPOSALS, "c", lambda _: [Note("c is off")])
    here = view(logits_processors=["mine"])
    assert str(apply(["a", "b", "c"], here)) == "set --logits-processors a:A b:B mine (a; b); c is off"
    assert here.engine_args.logits_processors == ["mine", "a:A", "b:B"]


def test_an_option_that_the_user_switched_off_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    proposals(monkeypatch, a=Setting("kv_sharing_fast_prefill", True, "a"))
    here = dataclasses.replace(view(), refused=frozenset({"kv_sharing_fast_prefill"}))
    assert str(apply(["a"], here)) == "kept your --no-kv-sharing-fast-prefill"
    assert here.engine_args.kv_sharing_fast_prefill is False


def test_an_option_outside_the_list_is_a_bug_of_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    proposals(monkeypatch, a=Setting("enforce_eager", True, "a"))
    with pytest.raises(ValueError, match="does not set"):
        propose(["a"], view())
