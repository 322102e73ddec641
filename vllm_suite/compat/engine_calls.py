"""Ask every engine core behind an API server something small."""

from __future__ import annotations

from typing import Any

from vllm_suite.compat.worker_calls import EngineGone


async def call_engines(client: Any, method: str, *args: Any) -> dict[int, Any]:
    """Results of a method of the engine core, by engine index, for the engines that this API server manages.

    An engine answers between two steps. Raises EngineGone for a dead engine and whatever vLLM raises where the method
    failed.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    core = client.engine_core
    try:
        answers = await core.call_utility_all_async(method, *args)
    except EngineDeadError as error:
        raise EngineGone from error
    return dict(zip(list(core.engine_ranks_managed), answers, strict=True))
