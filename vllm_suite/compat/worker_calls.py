"""Ask every worker behind an API server something small."""

from __future__ import annotations

from typing import Any


class EngineGone(Exception):
    """The engine has ended; it answers no more."""


async def call_workers(client: Any, method: str) -> dict[int, list[Any]]:
    """Results of a method of the worker class, by engine index, each a list with one result per worker.

    The engines are those that this API server manages: one, or several under data parallelism. vLLM is given no
    timeout: a worker's late answer would then be taken for that of the next call. Raises EngineGone for a dead engine
    and whatever vLLM raises where a worker failed.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    core = client.engine_core
    engines = list(core.engine_ranks_managed)
    try:
        if len(engines) == 1:
            return {engines[0]: await client.collective_rpc(method)}
        # `collective_rpc` asks all engines, and returns what the first of them answered.
        answers = await core.call_utility_all_async("collective_rpc", method, None, (), None)
    except EngineDeadError as error:
        raise EngineGone from error
    return dict(zip(engines, answers, strict=True))


def is_first_server(config: Any) -> bool:
    """Whether this process is the first of the instance's API servers; `config` is vLLM's `VllmConfig`."""
    return bool(config.parallel_config._api_process_rank == 0)
