"""From the role and a multimodal model to vLLM's own options; see :mod:`vllm_suite.compat.settings`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from vllm_suite.catalog import NO_LOCAL_ENCODER, SelectionError
from vllm_suite.compat.model_files import is_multimodal, read_config
from vllm_suite.compat.settings import Note, Setting, View
from vllm_suite.identity import ENV_ROLE

CONNECTOR = "SuiteECConnector"
CONNECTOR_MODULE = "vllm_epd.connector"
MANAGER = "vllm_epd.manager.SuiteEncoderCacheManager"
SCHEDULER = "vllm_suite.compat.scheduler.make_scheduler"

EC_ROLE = {"encode": "ec_producer", "prefill": "ec_consumer", "decode": "ec_consumer", "any": "ec_both"}
MODALITIES = ("image", "video", "audio", "vision_chunk")
"""Every kind of input that some model of vLLM has an encoder for."""


def propose(view: View) -> list[Setting | Note]:
    """The EC connector in the direction of the role, and the cache manager that goes with it.

    Raises SelectionError for a model or switch that the role cannot work with.
    """
    args, alone = view.engine_args, NO_LOCAL_ENCODER.on()
    if alone and view.role not in ("prefill", "decode"):
        raise SelectionError(
            f"{NO_LOCAL_ENCODER.option} leaves the encoder out, and an instance of role {view.role} has to encode; "
            f"leave it out, or set {ENV_ROLE} to prefill or decode"
        )
    config = read_config(args)
    without = _without_media(args, config)
    if without:
        if view.role == "encode" or alone:
            what = "an instance of role encode" if view.role == "encode" else NO_LOCAL_ENCODER.option
            raise SelectionError(f"epd: {what} needs a multimodal model, and {without}")
        return [Note(f"epd: {without}, nothing is set")]
    if config is not None and config.get("is_encoder_decoder"):
        raise SelectionError(
            f"epd: {args.model} is an encoder-decoder model, whose encoder output vLLM keeps out of the encoder cache; "
            "serve it without plugin epd"
        )
    settings: list[Setting | Note] = [_connector(view, alone)]
    manager = {"encoder_cache_manager_cls": MANAGER}
    why = "an item that is stored costs no encode" if view.role == "encode" else "prefill up to an item under way"
    settings.append(Setting("ec_manager_config", manager, f"epd, {why}"))
    if view.role == "any":
        settings.append(Setting("scheduler_cls", SCHEDULER, "epd, requests that only encode"))
    if alone:
        settings.append(Setting("limit_mm_per_prompt", dict.fromkeys(MODALITIES, 0), "epd, no encoder is loaded"))
        settings.append(Setting("enable_mm_embeds", True, "epd, media come encoded"))
    if config is None:
        settings.append(Note(f"epd: config.json of {args.model} cannot be read here; taken for a multimodal model"))
    return settings


def check(view: View) -> None:
    """Refuse, with the options as vLLM will see them, what cannot work with encoder outputs from elsewhere."""
    args, alone = view.engine_args, NO_LOCAL_ENCODER.on()
    transfer = args.ec_transfer_config
    if transfer is None:
        return
    ours = _get(transfer, "ec_connector") == CONNECTOR
    if ours and args.pipeline_parallel_size > 1:
        raise SelectionError(
            f"{CONNECTOR} does not support pipeline parallelism: only the first stage takes encoder outputs; use "
            "--tensor-parallel-size, or more instances"
        )
    role = _get(transfer, "ec_role")
    if view.role == "encode" and role != "ec_producer":
        raise SelectionError(
            f"role encode needs ec_role ec_producer in --ec-transfer-config, not {role}: any other loads the language "
            f"model; change it, or {ENV_ROLE}"
        )
    if view.role == "encode" and view.device == "cpu" and _v2() and args.worker_cls == "auto":
        raise SelectionError(
            "role encode on the CPU platform needs vLLM's V1 model runner: its V2 runner loads an encoder-only model "
            "as a whole one; unset VLLM_USE_V2_MODEL_RUNNER, or name a worker that does not with --worker-cls"
        )
    if alone:
        _check_alone(args, transfer, role, ours)


def _check_alone(args: Any, transfer: Any, role: Any, ours: bool) -> None:
    option = NO_LOCAL_ENCODER.option
    if role != "ec_consumer":
        raise SelectionError(f"{option} needs ec_role ec_consumer in --ec-transfer-config, not {role}")
    left = {kind: _count(limit) for kind, limit in args.limit_mm_per_prompt.items() if _count(limit) != 0}
    if left or not set(MODALITIES) <= set(args.limit_mm_per_prompt):
        given = ", ".join(f"{kind} {count}" for kind, count in left.items()) or "only some kinds of input"
        raise SelectionError(
            f"{option} sets every limit of --limit-mm-per-prompt to 0, and yours names {given}; leave yours out"
        )
    if not args.enable_mm_embeds:
        raise SelectionError(f"{option} and --no-enable-mm-embeds leave no way to take media; leave one out")
    suite = (_get(transfer, "ec_connector_extra_config") or {}).get("suite") or {}
    if ours and suite.get("on_failure") != "fail":
        raise SelectionError(
            f"{option} leaves nothing to encode with where an item cannot be had; set "
            'ec_connector_extra_config.suite.on_failure to "fail" in your --ec-transfer-config'
        )


def _connector(view: View, alone: bool) -> Setting:
    config: dict[str, Any] = {
        "ec_connector": CONNECTOR,
        "ec_connector_module_path": CONNECTOR_MODULE,
        "ec_role": EC_ROLE[view.role],
    }
    if alone:
        config["ec_connector_extra_config"] = {"suite": {"on_failure": "fail"}}
    return Setting("ec_transfer_config", config, f"epd, role {view.role}")


def _without_media(args: Any, config: dict[str, Any] | None) -> str | None:
    """Why there will be nothing to encode, or None."""
    if args.language_model_only:
        return "--language-model-only is given"
    if config is not None and not is_multimodal(config):
        return f"{args.model} is a text-only model"
    return None


def _v2() -> bool:
    return os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "") not in ("", "0")


def _count(limit: Any) -> int:
    count: int = limit.get("count", 999) if isinstance(limit, Mapping) else getattr(limit, "count", limit)
    return count


def _get(transfer: Any, key: str) -> Any:
    return transfer.get(key) if isinstance(transfer, Mapping) else getattr(transfer, key, None)
