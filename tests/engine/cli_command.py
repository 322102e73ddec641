"""vLLM's own command-line code with the suite installed, up to where an engine would start; for `cli_scenarios`.

The first argument of the process is the folder of a tiny model.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from pathlib import Path
from typing import Any

import vllm.entrypoints.cli.main as vllm_cli
import vllm.entrypoints.cli.serve as serve
from vllm.engine.arg_utils import AsyncEngineArgs
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
