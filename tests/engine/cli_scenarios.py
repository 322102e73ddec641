"""Runs vLLM's own command-line code with the suite installed, up to where an engine would start.

``python cli_scenarios.py MODEL`` imports vLLM once, runs each scenario in a fork of that process and prints one
JSON object ``{scenario: {...}}`` on its last line.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vllm.entrypoints.cli.main as vllm_cli
import vllm.entrypoints.cli.serve as serve
import vllm.plugins as vllm_plugins
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.usage.usage_lib import UsageContext

try:
    from vllm.entrypoints.common.startup import get_non_default_args  # 0.33
except ImportError:
    from vllm.entrypoints.serve.utils.api_utils import get_non_default_args  # 0.32

MODEL = sys.argv[1]
WORK = Path(MODEL).parent
Facts = dict[str, Any]


def command(*argv: str, env: dict[str, str] | None = None) -> Facts:
    """``vllm ARGV``; what was parsed, or how it ended."""
    os.environ.update(env or {})
    seen: Facts = {}
    serve.ServeSubcommand.cmd = staticmethod(lambda args: seen.update(args=args))
    sys.argv = ["/usr/bin/vllm", *argv]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            vllm_cli.main()
    except SystemExit as end:
        seen["exit"] = end.code
    return seen | {"out": out.getvalue(), "err": err.getvalue()[-2000:]}


def configure(seen: Facts) -> Facts:
    """Build the engine configuration of a parsed ``vllm serve``, as the API server does."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vllm.suite").addHandler(handler)
    args = seen.pop("args")
    args.model = args.model_tag or args.model
    engine_args = AsyncEngineArgs.from_cli_args(args)
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    again = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    transfer = config.kv_transfer_config
    encoded, media = config.ec_transfer_config, config.model_config.multimodal_config
    return facts(lines) | {
        "ec_connector": encoded and encoded.ec_connector,
        "ec_role": encoded and encoded.ec_role,
        "ec_extra": encoded and encoded.ec_connector_extra_config,
        "manager": config.ec_manager_config.encoder_cache_manager_cls,
        "scheduler": config.scheduler_config.scheduler_cls,
        "encoder_only": config.is_mm_encoder_only,
        "media": media and [media.get_limit_per_prompt("image"), media.enable_mm_embeds],
        "model": args.model,
        "same": transfer is again.kv_transfer_config,
        "non_default": sorted(get_non_default_args(args)),
        "connector": transfer and transfer.kv_connector,
        "kv_role": transfer and transfer.kv_role,
        "policy": transfer and transfer.kv_load_failure_policy,
        "architecture": config.model_config.architecture,
        "skip": config.cache_config.kv_sharing_fast_prefill,
        "extension": config.parallel_config.worker_extension_cls,
        "processors": config.model_config.logits_processors,
    }


def facts(lines: list[str]) -> Facts:
    import vllm.envs as envs
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.platforms import current_platform

    from vllm_suite.identity import identity

    current_platform.validate_environ(True)  # raises for a variable that vLLM does not know
    return {
        "lines": lines,
        "registered": "SuiteNixlConnector" in KVConnectorFactory._registry,
        "allowlist": os.environ.get("VLLM_PLUGINS"),
        "selection": os.environ.get("VLLM_SUITE_PLUGINS"),
        "instance_id": identity().instance_id if "VLLM_SUITE_EPOCH" in os.environ else None,
        "in_cache_key": [k for k, v in envs.compile_factors().items() if k.startswith("VLLM_SUITE") and v is not None],
    }


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


def swiftkv(*argv: str, plugins: str = "swiftkv", settings: Facts | None = None, role: str = "any") -> Facts:
    given = ["--additional-config", json.dumps({"suite": {"swiftkv": settings}})] if settings is not None else []
    words = ("serve", str(WORK / "swiftkv"), "--plugins", plugins, *given, *argv)
    seen = command(*words, env={"VLLM_SUITE_ROLE": role})
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            return configure(seen)
    except SystemExit as end:
        return {"exit": end.code, "err": err.getvalue()}


def swiftkv_armed() -> Facts:
    return swiftkv()


def swiftkv_refused() -> Facts:
    return swiftkv("--no-kv-sharing-fast-prefill")


def swiftkv_refused_in_yaml() -> Facts:
    path = WORK / "swiftkv.yaml"
    path.write_text("kv-sharing-fast-prefill: false\n")
    return swiftkv("--config", str(path))


def swiftkv_api_server_process() -> Facts:
    """Another process of the same server, which parses nothing, comes to the same configuration."""
    os.environ["VLLM_SUITE_REFUSED_OPTIONS"] = "left,by,another,server"
    first = swiftkv("--no-kv-sharing-fast-prefill")
    args = AsyncEngineArgs(model=str(WORK / "swiftkv"))
    again = args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    return {"first": first["skip"], "again": again.cache_config.kv_sharing_fast_prefill}


def swiftkv_ordinary_model() -> Facts:
    return configure(command("serve", MODEL, "--plugins", "swiftkv"))


def swiftkv_prefill_only() -> Facts:
    mine = ("--logits-processors", "vllm.v1.sample.logits_processor:MinPLogitsProcessor")
    return swiftkv(*mine, plugins="swiftkv,disagg", settings={"prefill_only": True}, role="prefill")


def swiftkv_prefill_only_alone() -> Facts:
    return swiftkv(settings={"prefill_only": True})


def swiftkv_bad_setting() -> Facts:
    return swiftkv(settings={"prefil_only": True})


def epd(*argv: str, role: str = "any", plugins: str = "epd", model: str = "vision", **env: str) -> Facts:
    seen = command("serve", str(WORK / model), "--plugins", plugins, *argv, env={"VLLM_SUITE_ROLE": role, **env})
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            return configure(seen) | {"switch": os.environ.get("VLLM_SUITE_EPD_NO_LOCAL_ENCODER")}
    except SystemExit as end:
        return {"exit": end.code, "err": err.getvalue()}


def epd_encode() -> Facts:
    return epd(role="encode")


def epd_prefill() -> Facts:
    return epd(role="prefill", plugins="disagg,epd")


def epd_any() -> Facts:
    return epd()


def epd_alone() -> Facts:
    return epd("--epd-no-local-encoder", role="decode")


def epd_alone_in_yaml() -> Facts:
    path = WORK / "epd.yaml"
    path.write_text("epd-no-local-encoder: true\n")
    return epd("--config", str(path), role="prefill")


def epd_alone_by_environment() -> Facts:
    return epd(role="prefill", VLLM_SUITE_EPD_NO_LOCAL_ENCODER="1")


def epd_text_only() -> Facts:
    return epd(model="tiny", role="prefill")


def epd_alone_and_any() -> Facts:
    return epd("--epd-no-local-encoder")


def epd_encode_text_only() -> Facts:
    return epd(model="tiny", role="encode")


def epd_switch_without_plugin() -> Facts:
    return epd("--epd-no-local-encoder", plugins="disagg")


def epd_switch_without_suite() -> Facts:
    return epd("--epd-no-local-encoder", plugins="")


def dler(*argv: str, plugins: str = "dler", settings: Facts | None = None, model: str = MODEL) -> Facts:
    given = ["--additional-config", json.dumps({"suite": {"dler": settings}})] if settings is not None else []
    seen = command("serve", model, "--plugins", plugins, *given, *argv)
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            return configure(seen)
    except SystemExit as end:
        return {"exit": end.code, "err": err.getvalue()}


def dler_and_all_others() -> Facts:
    return dler("--scheduling-policy", "priority", plugins="disagg,epd,dler", model=str(WORK / "vision"))


def dler_keeps_yours() -> Facts:
    return dler("--scheduler-cls", "vllm.v1.core.sched.scheduler.Scheduler")


def dler_bad_setting() -> Facts:
    return dler(settings={"victims": {"max_eviction": 2}})


def epd_help() -> Facts:
    return command("serve", "--help=epd-no-local")


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
    swiftkv_armed,
    swiftkv_refused,
    swiftkv_refused_in_yaml,
    swiftkv_api_server_process,
    swiftkv_ordinary_model,
    swiftkv_prefill_only,
    swiftkv_prefill_only_alone,
    swiftkv_bad_setting,
    dler_and_all_others,
    dler_keeps_yours,
    dler_bad_setting,
    epd_encode,
    epd_prefill,
    epd_any,
    epd_alone,
    epd_alone_in_yaml,
    epd_alone_by_environment,
    epd_text_only,
    epd_alone_and_any,
    epd_encode_text_only,
    epd_switch_without_plugin,
    epd_switch_without_suite,
    epd_help,
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
