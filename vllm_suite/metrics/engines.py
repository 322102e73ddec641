"""Series of SwiftKV models (`SWIFTKV`) and of the length-aware scheduler (`SCHED`)."""

from __future__ import annotations

from vllm_suite.metrics.table import SeriesSpec, one_of, within

CLASS = within("class", "classes that clients name, `classes.max_labels` at most, then `other`")
SHARE = one_of("share", "0.5", "0.9", "0.99")
POLL = one_of("reason", "error", "timeout")

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
        (POLL,),
    ),
)

# `class` is the client's `dler_class`: default where it gave none, other beyond the first `classes.max_labels`.
SCHED: tuple[SeriesSpec, ...] = (
    SeriesSpec("vllm_suite_sched_active", "gauge", "1 where requests are ordered by length, 0 where by another rule."),
    SeriesSpec("vllm_suite_sched_kappa", "gauge", "Rule kappa: seconds that one token of size is worth, now."),
    SeriesSpec("vllm_suite_sched_boost_seconds", "gauge", "Rule boost: scale of the boost, now."),
    SeriesSpec("vllm_suite_sched_queue_length", "gauge", "Requests that wait, those evicted among them.", (CLASS,)),
    SeriesSpec("vllm_suite_sched_queue_age_seconds", "gauge", "Seconds since the oldest of them came.", (CLASS,)),
    SeriesSpec(
        "vllm_suite_sched_requests_total",
        "counter",
        "Requests that ended, by end: stop, length, repetition, abort, error.",
        (
            CLASS,
            one_of("end", "stop", "length", "repetition", "abort", "error"),
        ),
    ),
    SeriesSpec("vllm_suite_sched_output_tokens_total", "counter", "Tokens that ended requests generated.", (CLASS,)),
    SeriesSpec(
        "vllm_suite_sched_latency_seconds_total", "counter", "Seconds from their arrival to their end.", (CLASS,)
    ),
    SeriesSpec(
        "vllm_suite_sched_normalised_latency_seconds",
        "gauge",
        "Seconds from arrival to end for each generated token, quantiles of the last 256 requests of a class.",
        (CLASS, SHARE),
    ),
    SeriesSpec(
        "vllm_suite_sched_length_error_tokens",
        "gauge",
        "Output tokens expected on arrival minus those generated, quantiles of the last 512 that ended by themselves.",
        (SHARE,),
    ),
    SeriesSpec(
        "vllm_suite_sched_wait_p99_seconds",
        "gauge",
        "99th percentile of waiting to begin, of the last admissions: actual, and in_turn had the order been that of "
        "arrival.",
        (one_of("order", "actual", "in_turn"),),
    ),
    SeriesSpec("vllm_suite_sched_overtakes_total", "counter", "Requests that began while an older one waited."),
    SeriesSpec("vllm_suite_sched_boosts_total", "counter", "Times that a waiting request moved forward."),
    SeriesSpec(
        "vllm_suite_sched_evictions_total",
        "counter",
        "Running requests that were queued again, by reason: kv_full, reset; unforeseen where no victim was chosen.",
        (one_of("reason", "kv_full", "reset", "unforeseen"),),
    ),
    SeriesSpec("vllm_suite_sched_caps_total", "counter", "Answers that the cap of their class ended.", (CLASS,)),
    SeriesSpec(
        "vllm_suite_sched_group_stops_total", "counter", "Samples ended because enough of their group had finished."
    ),
    SeriesSpec("vllm_suite_sched_gate_closed_steps_total", "counter", "Steps in which the gate kept a request out."),
    SeriesSpec(
        "vllm_suite_sched_state_total",
        "counter",
        "Readings and writings of the state file (load, save) by outcome: ok, missing, failed.",
        (
            one_of("what", "load", "save"),
            one_of("outcome", "ok", "missing", "failed"),
        ),
    ),
    SeriesSpec(
        "vllm_suite_sched_refused_arguments_total",
        "counter",
        "vllm_xargs whose values make no sense.",
        (within("name", "names of `vllm_xargs` that the plugin reads"),),
    ),
    SeriesSpec(
        "vllm_suite_sched_poll_failures_total",
        "counter",
        "Readings of the scheduler's counters that failed: error, timeout.",
        (POLL,),
    ),
)
