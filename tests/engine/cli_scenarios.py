"""Runs vLLM's own command-line code with the suite installed, up to where an engine would start.

``python cli_scenarios.py MODEL`` imports vLLM once, runs each scenario in a fork of that process and prints one
JSON object ``{scenario: {...}}`` on its last line.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cli_plugins
import vllm.plugins as vllm_plugins
from cli_command import MODEL, WORK, Facts, command, configure, facts
from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext


def help_short() -> Facts:
    return command("serve", "--help")


def help_search() -> Facts:
    return command("serve", "--help=plugins")


def no_plugins() -> Facts:
    return configure(command("serve", MODEL))


def two_words() -> Facts:
    return configure(
        command("serve", MODEL, "--plugins", "disagg", "--port", "8123", env={"VLLM_SUITE_ROLE": "prefill"})
    )


def one_word_before_the_model() -> Facts:
    return configure(command("serve", "--plugins=disagg", MODEL, env={"VLLM_SUITE_ROLE": "decode"}))


def yaml() -> Facts:
    path = WORK / "serve.yaml"
    path.write_text(f"model: {MODEL}\nplugins: disagg\n")
    return configure(command("serve", "--config", str(path)))


def environment() -> Facts:
    return configure(command("serve", MODEL, env={"VLLM_SUITE_PLUGINS": "disagg"}))


def option_beats_environment() -> Facts:
    return configure(command("serve", MODEL, "--plugins", "", env={"VLLM_SUITE_PLUGINS": "not-a-plugin"}))


def kept() -> Facts:
    mine = json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_consumer"})
    return configure(command("serve", MODEL, "--plugins", "disagg", "--kv-transfer-config", mine))


def unknown() -> Facts:
    return command("serve", MODEL, "--plugins", "disagg,nope")


def bad_environment() -> Facts:
    return command("serve", MODEL, env={"VLLM_SUITE_PLUGINS": "nope"})


def old_vllm() -> Facts:
    import importlib.metadata as metadata

    true = metadata.version
    metadata.version = lambda name: "0.31.0" if name.startswith("vllm") and name != "vllm-suite" else true(name)
    return command("serve", MODEL, "--plugins", "disagg")


def old_vllm_unasked() -> Facts:
    import importlib.metadata as metadata

    true = metadata.version
    metadata.version = lambda name: "0.31.0" if name.startswith("vllm") and name != "vllm-suite" else true(name)
    seen = command("serve", MODEL)
    return {"parsed": "args" in seen, "exit": seen.get("exit")}


def library() -> Facts:
    """``LLM(...)`` in a program whose own arguments happen to look like ours."""
    sys.argv = ["/home/someone/train.py", "--plugins", "theirs"]
    os.environ["VLLM_SUITE_PLUGINS"] = "disagg"
    config = EngineArgs(model=MODEL).create_engine_config(usage_context=UsageContext.LLM_CLASS)
    assert config.kv_transfer_config is not None
    return facts([]) | {"connector": config.kv_transfer_config.kv_connector, "argv": sys.argv}


def library_late() -> Facts:
    """The selection is made after vLLM has loaded its plugins."""
    sys.argv = ["/home/someone/notebook.py"]
    vllm_plugins.load_general_plugins()
    os.environ["VLLM_SUITE_PLUGINS"] = "disagg"
    config = EngineArgs(model=MODEL).create_engine_config(usage_context=UsageContext.LLM_CLASS)
    assert config.kv_transfer_config is not None
    return facts([]) | {"connector": config.kv_transfer_config.kv_connector}


def upstream_has_the_option() -> Facts:
    true = EngineArgs.add_cli_args

    def add_cli_args(parser: Any) -> Any:
        parser = true(parser)
        parser.add_argument("--plugins", help="upstream's")
        return parser

    EngineArgs.add_cli_args = staticmethod(add_cli_args)
    seen = command("serve", MODEL, "--plugins", "theirs")
    return {"plugins": seen["args"].plugins if "args" in seen else None, "err": seen["err"]}


def parser_moved() -> Facts:
    """vLLM's parser cannot be taught, so the option is taken off the command line."""
    import vllm.engine.arg_utils as arg_utils

    hidden = type("Moved", (), {})
    true = arg_utils.EngineArgs
    arg_utils.EngineArgs = hidden
    sys.argv = ["/usr/bin/vllm", "serve", MODEL, "--plugins", "disagg"]
    vllm_plugins.load_general_plugins()
    arg_utils.EngineArgs = true
    return {"argv": sys.argv, "selection": os.environ.get("VLLM_SUITE_PLUGINS")}


def endpoints() -> list[str]:
    return [plugin.name for plugin in vllm_plugins.load_endpoint_plugins(("generate",))]


def foreign_plugins() -> Facts:
    """With a distribution that has an endpoint plugin, a general plugin and a statistics logger of its own."""
    result = configure(command("serve", MODEL, "--plugins", "disagg"))
    loggers = list(vllm_plugins.load_plugins_by_group("vllm.stat_logger_plugins"))
    general = list(vllm_plugins.load_plugins_by_group("vllm.general_plugins"))
    return result | {"endpoints": endpoints(), "loggers": loggers, "general": general}


def foreign_list_of_the_user() -> Facts:
    os.environ["VLLM_PLUGINS"] = "vllm_suite,foreign_routes"
    result = configure(command("serve", MODEL, "--plugins", "disagg"))
    return result | {
        "endpoints": endpoints(),
        "loggers": list(vllm_plugins.load_plugins_by_group("vllm.stat_logger_plugins")),
    }


def name_clash() -> Facts:
    """A foreign distribution uses one name for a general plugin and for routes."""
    info = WORK / "foreign" / "clash-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: clash\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nclash = foreign:general\n[vllm.endpoint_plugins]\nclash = foreign:Routes\n"
    )
    result = configure(command("serve", MODEL, "--plugins", "disagg"))
    general = list(vllm_plugins.load_plugins_by_group("vllm.general_plugins"))
    return result | {"endpoints": endpoints(), "general": general}


SCENARIOS: list[Callable[[], Facts]] = [
    help_short,
    help_search,
    no_plugins,
    two_words,
    one_word_before_the_model,
    yaml,
    environment,
    option_beats_environment,
    kept,
    unknown,
    bad_environment,
    old_vllm,
    old_vllm_unasked,
    library,
    library_late,
    upstream_has_the_option,
    parser_moved,
    foreign_plugins,
    foreign_list_of_the_user,
    name_clash,
    *cli_plugins.SCENARIOS,
]


def run(scenario: Callable[[], Facts], path: Path) -> Facts:
    child = os.fork()
    if child == 0:
        try:
            result = scenario()
            result.pop("args", None)
        except BaseException:  # noqa: BLE001  the fork must end here whatever happened in it
            result = {"crash": traceback.format_exc()}
        path.write_text(json.dumps(result))
        os._exit(0)
    os.waitpid(child, 0)
    facts: Facts = json.loads(path.read_text())
    return facts


if __name__ == "__main__":
    print("\n" + json.dumps({s.__name__: run(s, WORK / f"{s.__name__}.json") for s in SCENARIOS}))
