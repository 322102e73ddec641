"""From a SwiftKV model and its settings to vLLM's options, and what is refused on the way."""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vllm_swiftkv
from vllm_suite.catalog import PLUGINS, SelectionError
from vllm_suite.compat import hooks
from vllm_suite.compat.settings import Applied, Note, Setting, View, apply
from vllm_suite.identity import Role
from vllm_swiftkv.families import FAMILIES
from vllm_swiftkv.options import BLOCK_CONNECTORS, EXTENSION, GUARD, is_swiftkv
from vllm_swiftkv.settings import SwiftKVSettings

pytest.importorskip("vllm")

ROOT = Path(vllm_swiftkv.__file__).parent
ONLY = {"prefill_only": True}
PRODUCER = {"kv_connector": "NixlConnector", "kv_role": "kv_producer"}
FLAG = "kv_sharing_fast_prefill"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """`write(architecture, model_type)`: a folder with such a config.json."""

    def make(architecture: str | None = "LlamaSwiftKVForCausalLM", model_type: str = "llama_swiftkv") -> str:
        config: dict[str, Any] = {"model_type": model_type, "num_hidden_layers": 2, "num_key_value_layers": 1}
        if architecture:
            config["architectures"] = [architecture]
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return make


def args(model: str, settings: dict[str, Any] | None = None, **given: Any) -> SimpleNamespace:
    """Engine arguments with vLLM's defaults of what the plugin looks at."""
    unset: dict[str, Any] = {
        **{"model": model, "hf_config_path": None, "config_format": "auto", "revision": None, "hf_token": None},
        **{"hf_overrides": {}, "speculative_config": None, "kv_transfer_config": None, FLAG: False},
        **{"worker_extension_cls": "", "logits_processors": None},
        "additional_config": {"suite": {"swiftkv": settings}} if settings is not None else {},
    }
    assert set(given) <= set(unset)
    return SimpleNamespace(**unset | given)


def run(engine_args: SimpleNamespace, *refused: str, role: Role = "any") -> Applied:
    return apply(["swiftkv"], View(role, "cpu", engine_args, frozenset(refused)))


# -- the catalog


def test_the_catalog_names_every_family_and_the_package_holds_its_class() -> None:
    names = {item.name for item in PLUGINS["swiftkv"].models}
    assert names == {family.architecture for family in FAMILIES} == set(vllm_swiftkv._MODULES)
    # vLLM hashes all files of a package, and of a module the file alone: a changed mix-in must not go unseen.
    assert {item.module for item in PLUGINS["swiftkv"].models} == {"vllm_swiftkv"}
    assert Path(vllm_swiftkv.__file__).name == "__init__.py"
    for architecture, module in vllm_swiftkv._MODULES.items():
        tree = ast.parse((ROOT / "models" / f"{module}.py").read_text())
        assert architecture in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    with pytest.raises(AttributeError, match="NoSuchModel"):
        _ = vllm_swiftkv.NoSuchModel


CONFIGS = """
import json, pickle, sys
from vllm_suite.compat.registry import register_configs
register_configs(["vllm_swiftkv.configs"]); register_configs(["vllm_swiftkv.configs"])
from transformers import AutoConfig
for trust in (True, False):
    config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=trust)
    assert (type(config).__module__, config.num_key_value_layers) == ("vllm_swiftkv.configs", 1), config
sys.stdout.write(pickle.dumps(config).hex())
"""
UNPICKLE = """
import pickle, sys
config = pickle.loads(bytes.fromhex(sys.stdin.read()))
assert (type(config).__name__, config.num_key_value_layers, config.model_type) == (
    "LlamaSwiftKVConfig", 1, "llama_swiftkv"), config
"""


def test_a_config_is_ours_with_or_without_remote_code_and_crosses_processes(write: Callable[..., str]) -> None:
    folder = write()
    path = Path(folder, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "nowhere.NoConfig"}}))
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    dumped = subprocess.run(
        [sys.executable, "-c", CONFIGS, folder], env=env, capture_output=True, text=True, timeout=60
    )
    assert dumped.returncode == 0, dumped.stderr[-2000:]
    subprocess.run([sys.executable, "-c", UNPICKLE], input=dumped.stdout, env=env, text=True, timeout=60, check=True)


# -- settings


@pytest.mark.parametrize(
    ("additional", "text"),
    [
        ({"suite": {"swiftkv": {"skpi": True}}}, r"additional_config\.suite\.swiftkv\.skpi: .*settings: skip, prefill"),
        ({"suite": {"swiftkv": {"skip": "yes"}}}, r"swiftkv\.skip: .*boolean"),
        ({"suite": {"swiftkv": {"late_kv_kernel": "fast"}}}, r"swiftkv\.late_kv_kernel: .*'auto', 'on' or 'off'"),
        ({"suite": {"swiftkv": {"prefill_only": True, "skip": False}}}, "cannot go with skip: false"),
        ({"suite": {"swftkv": {}}}, r"suite: unknown plugin 'swftkv'; known plugins: disagg"),
        ({"suite": {"swiftkv": [1]}}, r"suite\.swiftkv must be an object"),
        ({"suite": "swiftkv"}, r"additional_config\.suite must be an object"),
    ],
)
def test_a_wrong_setting_names_its_key(additional: Any, text: str) -> None:
    with pytest.raises(SelectionError, match=text):
        SwiftKVSettings.of(SimpleNamespace(additional_config=additional))


@pytest.mark.parametrize("additional", [{}, None, {"other": 1}, {"suite": {}}, {"suite": {"swiftkv": {}}}])
def test_nothing_given_means_the_defaults(additional: Any) -> None:
    settings = SwiftKVSettings.of(SimpleNamespace(additional_config=additional))
    assert (settings.skip, settings.prefill_only, settings.late_kv_kernel) == (None, False, "auto")


# -- arming


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["Qwen3SwiftKVForCausalLM"], "model_type": "x"}, True),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama_swiftkv"}, False),
        ({"model_type": "mistral_swiftkv"}, True),
        ({"model_type": "mistral"}, False),
        ({}, False),
    ],
)
def test_what_a_swiftkv_model_is(config: dict[str, Any], expected: bool) -> None:
    assert is_swiftkv(config) is expected


def test_a_swiftkv_model_is_armed_and_counted(write: Callable[..., str]) -> None:
    here = args(write())
    text = str(run(here))
    assert (here.kv_sharing_fast_prefill, here.worker_extension_cls) == (True, EXTENSION)
    assert here.logits_processors is None
    assert "set --kv-sharing-fast-prefill True" in text


def test_hf_overrides_decide_as_they_do_in_vllm(write: Callable[..., str]) -> None:
    here = args(write("LlamaForCausalLM", "llama"), hf_overrides={"architectures": ["LlamaSwiftKVForCausalLM"]})
    run(here)
    assert here.kv_sharing_fast_prefill
    here = args(write(), hf_overrides={"architectures": ["LlamaForCausalLM"]})
    run(here)
    assert not here.kv_sharing_fast_prefill
    elsewhere = args("/no/such/model", hf_config_path=write())
    run(elsewhere)
    assert elsewhere.kv_sharing_fast_prefill


@pytest.mark.parametrize("settings", [None, {"skip": None}])
def test_an_explicit_no_of_the_user_stays(write: Callable[..., str], settings: dict[str, Any] | None) -> None:
    here = args(write(), settings)
    text = str(run(here, FLAG))
    assert (here.kv_sharing_fast_prefill, here.worker_extension_cls) == (False, "")
    assert text == "kept your --no-kv-sharing-fast-prefill; swiftkv: every layer computes every token"


def test_skip_false_is_the_same_for_programs(write: Callable[..., str]) -> None:
    here = args(write(), {"skip": False})
    text = str(run(here))
    assert (here.kv_sharing_fast_prefill, here.worker_extension_cls) == (False, "")
    assert "skip is false" in text


def test_a_users_yes_and_worker_extension_are_kept(write: Callable[..., str]) -> None:
    here = args(write(), worker_extension_cls="mine.Extension", **{FLAG: True})
    applied = run(here)
    assert here.worker_extension_cls == "mine.Extension"
    assert str(applied) == "kept your --kv-sharing-fast-prefill; kept your --worker-extension-cls"


@pytest.mark.parametrize(
    ("settings", "given", "refused", "text"),
    [
        ({"skip": False}, {FLAG: True}, (), "skip is false and --kv-sharing-fast-prefill is given"),
        ({"skip": True}, {}, (FLAG,), "skip is true and --no-kv-sharing-fast-prefill is given"),
    ],
)
def test_contradictions_are_refused(
    write: Callable[..., str], settings: dict[str, Any], given: dict[str, Any], refused: tuple[str, ...], text: str
) -> None:
    with pytest.raises(SelectionError, match=text):
        run(args(write(), settings, **given), *refused)


def test_another_model_is_left_alone_or_refused(write: Callable[..., str]) -> None:
    folder = write("LlamaForCausalLM", "llama")
    here = args(folder)
    assert run(here).notes == (Note(f"swiftkv: {folder} is no SwiftKV model, nothing is skipped"),)
    assert not here.kv_sharing_fast_prefill
    for settings in ({"skip": True}, ONLY):
        with pytest.raises(SelectionError, match=r"needs a SwiftKV model, and .* has architecture LlamaForCausalLM"):
            run(args(folder, settings))


@pytest.mark.parametrize("model", ["/no/such/model", "s3://bucket/model"])
def test_a_model_that_cannot_be_read_yet_is_said_and_not_guessed(model: str) -> None:
    here = args(model)
    assert "cannot be read here, so nothing is armed" in str(run(here))
    assert not here.kv_sharing_fast_prefill
    asked = args(model, {"skip": True})
    run(asked)
    assert (asked.kv_sharing_fast_prefill, asked.worker_extension_cls) == (True, EXTENSION)


# -- prefill-only instances


def test_the_guard_joins_the_users_processors_and_is_added_once(write: Callable[..., str]) -> None:
    here = args(write(), ONLY, kv_transfer_config=PRODUCER, logits_processors=["mine:Processor"])
    applied = run(here)
    assert here.logits_processors == ["mine:Processor", GUARD]
    assert f"set --logits-processors {GUARD}" in str(applied)
    assert here.kv_sharing_fast_prefill
    run(here)
    assert here.logits_processors == ["mine:Processor", GUARD]


@pytest.mark.parametrize("connector", sorted(BLOCK_CONNECTORS))
@pytest.mark.parametrize("role", ["kv_producer", "kv_both"])
def test_block_connectors_that_send_are_accepted(write: Callable[..., str], connector: str, role: str) -> None:
    transfer = {"kv_connector": connector, "kv_role": role}
    several = {
        **{"kv_connector": "MultiConnector", "kv_role": role},
        "kv_connector_extra_config": {"connectors": [transfer, transfer]},
    }
    for given in (transfer, SimpleNamespace(**transfer), several):
        run(args(write(), ONLY, kv_transfer_config=given))


LAYERWISE = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}


@pytest.mark.parametrize(
    ("given", "refused", "text"),
    [
        ({}, (), "needs a KV connector .* VLLM_SUITE_ROLE=prefill"),
        ({"kv_transfer_config": PRODUCER | {"kv_role": "kv_consumer"}}, (), "its kv_role is kv_consumer"),
        ({"kv_transfer_config": LAYERWISE}, (), "LMCacheConnectorV1 may save layer by layer"),
        (
            {
                "kv_transfer_config": PRODUCER
                | {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [PRODUCER, LAYERWISE]}}
            },
            (),
            "LMCacheConnectorV1 may save layer by layer",
        ),
        ({"kv_transfer_config": PRODUCER, "speculative_config": {"method": "ngram"}}, (), "--speculative-config"),
        ({"kv_transfer_config": PRODUCER}, (FLAG,), "cannot go with --no-kv-sharing-fast-prefill"),
    ],
)
def test_a_prefill_only_instance_that_could_not_work_is_refused(
    write: Callable[..., str], given: dict[str, Any], refused: tuple[str, ...], text: str
) -> None:
    with pytest.raises(SelectionError, match=text):
        run(args(write(), ONLY, **given), *refused)


def test_the_check_sees_the_connector_that_disagg_sets(write: Callable[..., str]) -> None:
    for names in (["disagg", "swiftkv"], ["swiftkv", "disagg"]):
        here = args(write(), ONLY)
        applied = apply(names, View("prefill", "cpu", here))
        assert {s.option for s in applied.set} >= {"kv_transfer_config", "logits_processors", FLAG}
        with pytest.raises(SelectionError, match="kv_role is kv_consumer"):
            apply(names, View("decode", "cpu", args(write(), ONLY)))


# -- `--no-...` is told from the default


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], set()),
        (["--kv-sharing-fast-prefill"], set()),
        (["--no-kv-sharing-fast-prefill"], {FLAG}),
        (["--no-kv-sharing-fast-prefill", "--kv-sharing-fast-prefill"], set()),
        (["--kv-sharing-fast-prefill", "--no-kv-sharing-fast-prefill"], {FLAG}),
    ],
)
def test_a_refusal_on_the_command_line_is_remembered(
    words: list[str], expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(hooks.ENV_REFUSED, "")
    parser = argparse.ArgumentParser()
    parser.add_argument("--kv-sharing-fast-prefill", action=argparse.BooleanOptionalAction, default=False)
    hooks.note_refusals(parser)
    value = parser.parse_args(words).kv_sharing_fast_prefill
    assert hooks.refused() == expected
    assert value is (bool(words) and not expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kv-sharing-fast-prefill: false\n", {FLAG}),
        ("kv_sharing_fast_prefill: false\nport: 1\n", {FLAG}),
        ("kv-sharing-fast-prefill: true\n", set()),
        ("enable-prefix-caching: false\n", set()),
        ("- a list\n", set()),
        ("{broken", set()),
        (None, set()),
    ],
)
def test_a_refusal_in_a_config_file_is_remembered(
    tmp_path: Path, text: str | None, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(hooks.ENV_REFUSED, "left_by_another")
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
    hooks.start_refusals(["vllm", "serve", "--config", str(tmp_path / "c.yaml")])
    assert hooks.refused() == expected


def test_a_line_of_the_log_is_one_line(write: Callable[..., str]) -> None:
    here = args(write(), ONLY, kv_transfer_config=PRODUCER)
    assert "\n" not in str(run(here))
    assert all(isinstance(s, Setting) for s in run(args(write())).set)
