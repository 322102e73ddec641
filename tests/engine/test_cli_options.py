"""`--plugins` on vLLM's own command line, from YAML and from the environment, and what it sets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from swiftkv_checkpoints import make_swiftkv_checkpoint

from vllm_suite.fleet.tiny_media import write

HERE = Path(__file__).parent
FOREIGN = """
class Routes:
    name = "foreign_routes"
    required_tasks = None
    def attach_router(self, app): pass
    async def init_state(self, engine_client, state, args): pass
def general(): pass
class Logger: pass
"""
FOREIGN_POINTS = """
[vllm.general_plugins]
foreign_general = foreign:general
[vllm.stat_logger_plugins]
foreign_logger = foreign:Logger
[vllm.endpoint_plugins]
foreign_routes = foreign:Routes
"""

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def results(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Facts]:
    """All scenarios, run by one process that imports vLLM once, beside a foreign distribution."""
    work = tmp_path_factory.mktemp("cli")
    shutil.copytree(model, work / "tiny")
    make_swiftkv_checkpoint(work / "swiftkv", "llama", layers=2, cut=1)
    write("qwen2_5_vl", work / "vision")
    site = work / "foreign"
    info = site / "foreign-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "foreign.py").write_text(FOREIGN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(FOREIGN_POINTS)
    env = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    env |= {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(HERE / "cli_scenarios.py"), str(work / "tiny")],
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts: dict[str, Facts] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


@pytest.fixture
def result(results: dict[str, Facts], request: pytest.FixtureRequest) -> Facts:
    """The facts of the scenario that the test is named after."""
    facts = results[request.node.name.removeprefix("test_")]
    assert "crash" not in facts, facts["crash"]
    return facts


def test_help_short(result: Facts) -> None:
    assert result["exit"] == 0
    assert "--plugins" in result["out"]


def test_help_search(result: Facts) -> None:
    assert "--plugins NAME[,NAME...]" in result["out"]
    assert "disagg" in result["out"]


def test_no_plugins(result: Facts) -> None:
    assert (result["connector"], result["lines"], result["allowlist"], result["selection"]) == (None, [], None, None)
    assert not result["registered"]
    assert result["instance_id"] is None


def test_two_words(result: Facts) -> None:
    assert (result["connector"], result["kv_role"], result["policy"]) == (
        "SuiteNixlConnector",
        "kv_producer",
        "recompute",
    )
    assert result["registered"]
    assert result["same"]
    assert result["instance_id"].endswith(":8123")
    assert result["in_cache_key"] == []
    [line] = result["lines"]
    assert "\n" not in line
    assert "plugins disagg (from --plugins), role prefill: set --kv-transfer-config" in line


def test_one_word_before_the_model(result: Facts) -> None:
    assert (result["connector"], result["kv_role"]) == ("SuiteNixlConnector", "kv_consumer")
    assert result["model"].endswith("tiny")
    # Handed to vLLM's Rust front end otherwise, which knows no such option.
    assert not [name for name in result["non_default"] if "plugins" in name]


def test_yaml(result: Facts) -> None:
    assert (result["connector"], result["kv_role"]) == ("SuiteNixlConnector", "kv_both")
    assert result["model"].endswith("tiny")


def test_environment(result: Facts) -> None:
    assert result["connector"] == "SuiteNixlConnector"
    assert "(from VLLM_SUITE_PLUGINS)" in result["lines"][0]


def test_option_beats_environment(result: Facts) -> None:
    assert (result["connector"], result["selection"], result["lines"]) == (None, "", [])


def test_kept(result: Facts) -> None:
    assert result["connector"] == "NixlConnector"
    assert "kept your --kv-transfer-config" in result["lines"][0]


@pytest.mark.parametrize(
    ("scenario", "text"),
    [
        ("unknown", "unknown plugin 'nope'; known plugins: disagg, epd"),
        ("dler_bad_setting", "additional_config.suite.dler.victims.max_eviction: Extra inputs are not permitted"),
        ("swiftkv_prefill_only_alone", "prefill_only needs a KV connector to hand prompts over"),
        ("swiftkv_bad_setting", "additional_config.suite.swiftkv.prefil_only: Extra inputs are not permitted"),
        (
            "epd_alone_and_any",
            "--epd-no-local-encoder leaves the encoder out, and an instance of role any has to encode",
        ),
        ("epd_encode_text_only", "an instance of role encode needs a multimodal model"),
        ("epd_switch_without_plugin", "--epd-no-local-encoder is a switch of plugin 'epd'; add --plugins epd"),
        ("epd_switch_without_suite", "--epd-no-local-encoder is a switch of plugin 'epd'; add --plugins epd"),
        ("bad_environment", "VLLM_SUITE_PLUGINS: unknown plugin 'nope'; known plugins: disagg"),
        ("old_vllm", "vLLM 0.31.0 is not supported; this release of vllm-suite needs vLLM >=0.32,<0.34"),
    ],
)
def test_refusals_exit_with_2(results: dict[str, Facts], scenario: str, text: str) -> None:
    facts = results[scenario]
    assert facts.get("exit") == 2, facts
    assert text in " ".join(facts["err"].split())
    assert "Traceback" not in facts["err"]


EXTENSION = "vllm_swiftkv.worker.SwiftKVWorkerExtension"


def test_swiftkv_armed(result: Facts) -> None:
    assert (result["architecture"], result["skip"]) == ("LlamaSwiftKVForCausalLM", True)
    assert (result["extension"], result["processors"]) == (EXTENSION, None)
    [line] = result["lines"]
    assert "set --kv-sharing-fast-prefill True" in line


@pytest.mark.parametrize("scenario", ["swiftkv_refused", "swiftkv_refused_in_yaml"])
def test_a_no_of_the_user_stays(results: dict[str, Facts], scenario: str) -> None:
    facts = results[scenario]
    assert (facts["skip"], facts["extension"]) == (False, ""), facts
    assert "kept your --no-kv-sharing-fast-prefill" in facts["lines"][0]


def test_swiftkv_api_server_process(result: Facts) -> None:
    assert result == {"first": False, "again": False}


def test_swiftkv_ordinary_model(result: Facts) -> None:
    assert (result["skip"], result["extension"]) == (False, "")
    assert "is no SwiftKV model, nothing is skipped" in result["lines"][0]


def test_swiftkv_prefill_only(result: Facts) -> None:
    assert (result["skip"], result["kv_role"]) == (True, "kv_producer")
    assert result["processors"] == [
        "vllm.v1.sample.logits_processor:MinPLogitsProcessor",
        "vllm_swiftkv.prefill_guard:PrefillGuard",
    ]


MANAGER = "vllm_epd.manager.SuiteEncoderCacheManager"


def test_epd_encode(result: Facts) -> None:
    assert (result["ec_connector"], result["ec_role"]) == ("SuiteECConnector", "ec_producer")
    assert result["encoder_only"]
    assert (result["manager"], result["scheduler"], result["connector"]) == (MANAGER, None, None)


def test_epd_prefill(result: Facts) -> None:
    assert (result["ec_role"], result["kv_role"], result["manager"]) == ("ec_consumer", "kv_producer", MANAGER)
    assert (result["scheduler"], result["encoder_only"]) == (None, False)
    assert result["media"] == [999, True]  # a consumer takes references to media, and media
    assert result["ec_extra"] == {}


def test_epd_any(result: Facts) -> None:
    assert (result["ec_role"], result["manager"]) == ("ec_both", MANAGER)
    assert result["scheduler"] == "vllm_suite.compat.scheduler.make_scheduler"


def test_dler_and_all_others(result: Facts) -> None:
    assert result["scheduler"] == "vllm_suite.compat.scheduler.make_scheduler"
    assert (result["ec_connector"], result["connector"]) == ("SuiteECConnector", "SuiteNixlConnector")
    assert "dler, boost 0.9" in result["lines"][0]


def test_dler_keeps_yours(result: Facts) -> None:
    assert result["scheduler"] == "vllm.v1.core.sched.scheduler.Scheduler"
    assert "kept your --scheduler-cls" in result["lines"][0]


@pytest.mark.parametrize("scenario", ["epd_alone", "epd_alone_in_yaml", "epd_alone_by_environment"])
def test_epd_without_a_local_encoder(results: dict[str, Facts], scenario: str) -> None:
    facts = results[scenario]
    assert "crash" not in facts, facts["crash"]
    assert (facts["ec_role"], facts["media"]) == ("ec_consumer", [0, True])
    assert facts["ec_extra"] == {"suite": {"on_failure": "fail"}}
    assert facts["switch"] == "1"  # what child processes go by
    assert not [name for name in facts["non_default"] if "epd" in name]  # vLLM's Rust front end knows no such option
    assert facts["in_cache_key"] == []


def test_epd_text_only(result: Facts) -> None:
    assert (result["ec_connector"], result["manager"]) == (None, None)
    assert "is a text-only model, nothing is set" in result["lines"][0]


def test_epd_help(result: Facts) -> None:
    assert "--epd-no-local-encoder" in result["out"]
    assert "Load no vision or audio encoder" in result["out"]


def test_old_vllm_unasked(result: Facts) -> None:
    assert result == {"parsed": True, "exit": None}


def test_library(result: Facts) -> None:
    assert result["connector"] == "SuiteNixlConnector"
    assert result["registered"]
    assert result["argv"][1:] == ["--plugins", "theirs"]
    # No HTTP server, so nobody's plugins need to be listed.
    assert result["allowlist"] is None


def test_library_late(result: Facts) -> None:
    assert result["connector"] == "SuiteNixlConnector"


def test_upstream_has_the_option(result: Facts) -> None:
    assert result["plugins"] == "theirs", result["err"]


def test_parser_moved(result: Facts) -> None:
    assert result["argv"][1] == "serve"
    assert "--plugins" not in result["argv"]
    assert result["selection"] == "disagg"


def test_foreign_plugins(result: Facts) -> None:
    assert result["endpoints"] == ["vllm_suite_control"]
    assert result["loggers"] == ["foreign_logger"]
    assert {"foreign_general", "vllm_suite", "lora_filesystem_resolver"} <= set(result["general"])
    assert "lora_hf_hub_resolver" not in result["allowlist"].split(",")


def test_foreign_list_of_the_user(result: Facts) -> None:
    assert sorted(result["endpoints"]) == ["foreign_routes", "vllm_suite_control"]
    assert result["loggers"] == []
    assert result["allowlist"] == "vllm_suite,foreign_routes,vllm_suite_control"


def test_name_clash(result: Facts) -> None:
    assert result["endpoints"] == ["vllm_suite_control"]
    assert "clash" in result["general"]
    assert result["allowlist"] is None
