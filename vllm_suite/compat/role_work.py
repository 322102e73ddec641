"""What an instance has done since its start, as vLLM counts it: the controller takes rates and lengths from it."""

from __future__ import annotations

_SAMPLES = {
    "vllm:request_prompt_tokens_sum": "prompt_tokens",
    "vllm:request_prompt_tokens_count": "finished",
    "vllm:request_generation_tokens_sum": "output_tokens",
    "vllm:generation_tokens_total": "generated",
}


def read_work() -> dict[str, int]:
    """`finished` requests, their `prompt_tokens` and `output_tokens`, and tokens `generated` for these and others.

    Empty under ``--disable-log-stats``, and with several API servers, whose counts lie in files; those do not switch.
    """
    from prometheus_client import REGISTRY
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    if get_prometheus_registry() is not REGISTRY:
        return {}
    found: dict[str, int] = {}
    for metric in REGISTRY.restricted_registry(tuple(_SAMPLES)).collect():
        for sample in metric.samples:
            name = _SAMPLES.get(sample.name)
            if name is not None:
                found[name] = found.get(name, 0) + int(sample.value)
    return found if len(found) == len(_SAMPLES) else {}
