"""From a SwiftKV model and the plugin's settings to vLLM's own options; see :mod:`vllm_suite.compat.settings`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_suite.catalog import SelectionError
from vllm_suite.compat.model_files import read_config
from vllm_suite.compat.settings import Note, Setting, View
from vllm_swiftkv.families import FAMILIES
from vllm_swiftkv.settings import SwiftKVSettings

EXTENSION = "vllm_swiftkv.worker.SwiftKVWorkerExtension"
GUARD = "vllm_swiftkv.prefill_guard:PrefillGuard"

# Connectors that move whole blocks once a prompt is computed. Others save a layer when its attention has run, and
# the later layers of a prefill-only instance never run.
BLOCK_CONNECTORS = frozenset(
    {"SuiteNixlConnector", "NixlConnector", "NixlPullConnector", "NixlPushConnector", "MooncakeConnector"}
)
PRODUCERS = ("kv_producer", "kv_both")

_ARCHITECTURES = frozenset(family.architecture for family in FAMILIES)
_MODEL_TYPES = frozenset(family.model_type for family in FAMILIES)


def is_swiftkv(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` describes a SwiftKV model: by its architecture, which is what picks the class."""
    named = config.get("architectures") or ()
    return bool(_ARCHITECTURES.intersection(named)) or (not named and config.get("model_type") in _MODEL_TYPES)


def propose(view: View) -> list[Setting | Note]:
    """Arm the skip, count it, and guard a prefill-only instance.

    Raises SelectionError for settings that contradict each other, the command line or the model.
    """
    args, settings = view.engine_args, SwiftKVSettings.of(view.engine_args)
    asked = settings.skip or settings.prefill_only
    config = read_config(args)
    if config is None:
        return [*_guard(settings), *_unknown_model(args, bool(asked))]
    if not is_swiftkv(config):
        if asked:
            what = "prefill_only" if settings.prefill_only else "skip"
            raise SelectionError(
                f"additional_config.suite.swiftkv.{what} needs a SwiftKV model, and {args.model!r} has architecture "
                f"{_first(config.get('architectures'))}; make one with `vllm-suite swiftkv convert`"
            )
        return [Note(f"swiftkv: {args.model} is no SwiftKV model, nothing is skipped")]
    return [*_guard(settings), *_arm(view, settings)]


def check(view: View) -> None:
    """Refuse a prefill-only instance that could not hand anything over, or would have to answer by itself.

    Where the skip is armed, requests that would read what was skipped are refused from here on.
    """
    args = view.engine_args
    if args.kv_sharing_fast_prefill:
        from vllm_suite.compat import prompt_logprobs

        prompt_logprobs.install()
    if not SwiftKVSettings.of(args).prefill_only:
        return
    where = "additional_config.suite.swiftkv.prefill_only"
    if args.speculative_config is not None:
        raise SelectionError(
            f"{where}: a prefill-only instance generates nothing to speculate on; remove --speculative-config"
        )
    if not args.kv_sharing_fast_prefill:
        raise SelectionError(f"{where} leaves the later layers out; it cannot go with --no-kv-sharing-fast-prefill")
    transfer = args.kv_transfer_config
    if transfer is None:
        raise SelectionError(
            f"{where} needs a KV connector to hand prompts over: add the plugin `disagg` with VLLM_SUITE_ROLE=prefill, "
            "or give --kv-transfer-config"
        )
    role = _get(transfer, "kv_role")
    if role not in PRODUCERS:
        raise SelectionError(
            f"{where} needs an instance that hands KV over, and its kv_role is {role}; use VLLM_SUITE_ROLE=prefill, or "
            f"one of {', '.join(PRODUCERS)} in --kv-transfer-config"
        )
    for name in _connectors(transfer):
        if name not in BLOCK_CONNECTORS:
            raise SelectionError(
                f"{where}: {name} may save layer by layer, and the later layers of a prefill-only instance never run; "
                f"use one of {', '.join(sorted(BLOCK_CONNECTORS))}"
            )


def _guard(settings: SwiftKVSettings) -> list[Setting]:
    return [Setting("logits_processors", [GUARD], "swiftkv, hand-offs only")] if settings.prefill_only else []


def _arm(view: View, settings: SwiftKVSettings) -> list[Setting | Note]:
    option = "kv_sharing_fast_prefill"
    given = bool(getattr(view.engine_args, option))
    if settings.skip is False:
        if given:
            raise SelectionError(
                "additional_config.suite.swiftkv.skip is false and --kv-sharing-fast-prefill is given; leave one out"
            )
        return [Note("swiftkv: skip is false, every layer computes every token")]
    if settings.skip and option in view.refused:
        raise SelectionError(
            "additional_config.suite.swiftkv.skip is true and --no-kv-sharing-fast-prefill is given; leave one out"
        )
    proposals: list[Setting | Note] = [Setting(option, True, "swiftkv, prompt tokens skip the later layers")]
    if option in view.refused:
        return [*proposals, Note("swiftkv: every layer computes every token")]
    return [*proposals, Setting("worker_extension_cls", EXTENSION, "swiftkv, counters for /metrics")]


def _unknown_model(args: Any, asked: bool) -> list[Setting | Note]:
    if asked or args.kv_sharing_fast_prefill:
        return [
            Setting("kv_sharing_fast_prefill", True, "swiftkv, as its settings ask"),
            Setting("worker_extension_cls", EXTENSION, "swiftkv, counters for /metrics"),
        ]
    return [
        Note(
            f"swiftkv: config.json of {args.model} cannot be read here, so nothing is armed; where it is a SwiftKV "
            "model, give --kv-sharing-fast-prefill"
        )
    ]


def _connectors(transfer: Any) -> Iterator[str]:
    """Names of the connectors that move blocks, those inside a MultiConnector among them."""
    name = _get(transfer, "kv_connector")
    if name != "MultiConnector":
        yield str(name)
        return
    extra = _get(transfer, "kv_connector_extra_config") or {}
    for child in extra.get("connectors") or ():
        yield from _connectors(child)


def _get(transfer: Any, key: str) -> Any:
    return transfer.get(key) if isinstance(transfer, dict) else getattr(transfer, key, None)


def _first(names: Any) -> str:
    return str(names[0]) if isinstance(names, list) and names else "none"
