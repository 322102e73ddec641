"""Scenarios of `cli_scenarios` that belong to one plugin."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable

from cli_command import MODEL, WORK, Facts, command, configure
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext


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
