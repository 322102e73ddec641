"""Every Prometheus series of the suite's plugins, in one table.

Names begin with ``vllm_suite_``: vLLM unregisters collectors of others whose name begins with its own prefix.
Labels listed here come after those of the process that exports them (``model_name`` and ``engine`` in an engine).
The router, which exports for itself, has its table in :mod:`vllm_suite.router.metrics`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class SeriesSpec(NamedTuple):
    """One series.

    Attributes:
        name: as scraped; counters end in ``_total``.
        labels: own labels; each has a bounded set of values.
        buckets: upper bounds, for histograms.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_PULL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_HELD_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)

# `peer` is the producer's instance id, taken from references whose claim the producer granted.
KV: tuple[SeriesSpec, ...] = (
    SeriesSpec("vllm_suite_kv_pulls_total", "counter", "Pulls by outcome: ok, recomputed or failed.", ("outcome",)),
    SeriesSpec("vllm_suite_kv_pull_bytes_total", "counter", "KV bytes pulled.", ("peer", "direction")),
    SeriesSpec("vllm_suite_kv_pull_blocks_total", "counter", "KV blocks pulled.", ("peer", "direction")),
    SeriesSpec(
        "vllm_suite_kv_pull_seconds",
        "histogram",
        "Seconds from the start of a pull, handshake included, to its end.",
        ("peer", "direction"),
        _PULL_SECONDS,
    ),
    SeriesSpec(
        "vllm_suite_kv_recomputes_total", "counter", "Prompts computed locally instead, by reason.", ("reason",)
    ),
    SeriesSpec("vllm_suite_kv_refused_total", "counter", "References refused before use, by reason.", ("reason",)),
    SeriesSpec(
        "vllm_suite_kv_leases_total",
        "counter",
        "Leases that ended on this producer: pulled, released, expired.",
        ("end",),
    ),
    SeriesSpec(
        "vllm_suite_kv_held_seconds",
        "histogram",
        "Seconds this producer kept the blocks of a finished prefill.",
        (),
        _HELD_SECONDS,
    ),
    SeriesSpec("vllm_suite_kv_leases_outstanding", "gauge", "Leases outstanding on this producer."),
    SeriesSpec(
        "vllm_suite_kv_contained_faults_total",
        "counter",
        "Faults of a transfer that the connector kept from ending the engine.",
        ("fault",),
    ),
)

SWIFTKV: tuple[SeriesSpec, ...] = (
    SeriesSpec("vllm_suite_swiftkv_prompt_tokens_total", "counter", "Prompt tokens computed by the head."),
    SeriesSpec("vllm_suite_swiftkv_head_tokens_total", "counter", "Tokens computed by the head, outputs included."),
    SeriesSpec("vllm_suite_swiftkv_tail_rows_total", "counter", "Rows computed by the tail."),
    SeriesSpec("vllm_suite_swiftkv_skipped_tokens_total", "counter", "Tokens of the head that the tail left out."),
    SeriesSpec("vllm_suite_swiftkv_steps_total", "counter", "Engine steps that ran the model."),
    SeriesSpec(
        "vllm_suite_swiftkv_skip_ratio", "gauge", "Share of the head's tokens that the tail left out, since the start."
    ),
    SeriesSpec("vllm_suite_swiftkv_armed", "gauge", "1 where prompt tokens skip the tail, 0 where none does."),
    SeriesSpec(
        "vllm_suite_swiftkv_poll_failures_total",
        "counter",
        "Readings of the workers' counters that failed: error, timeout.",
        ("reason",),
    ),
)
