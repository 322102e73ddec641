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

_FETCH_SECONDS = (0.0005, *_PULL_SECONDS)

# `peer` is the producer's instance id, taken from claims that it granted. `tier` is device or host.
EC: tuple[SeriesSpec, ...] = (
    SeriesSpec("vllm_suite_ec_fetches_total", "counter", "Fetches of items by outcome: ok, or failed.", ("outcome",)),
    SeriesSpec("vllm_suite_ec_fetch_bytes_total", "counter", "Bytes of items fetched, all ranks together.", ("peer",)),
    SeriesSpec(
        "vllm_suite_ec_fetch_seconds",
        "histogram",
        "Seconds to fetch an item that is made: claim, read and checks, on the slowest rank.",
        (),
        _FETCH_SECONDS,
    ),
    SeriesSpec(
        "vllm_suite_ec_refused_total",
        "counter",
        "Items that a request could not have from where it said they are, by reason.",
        ("reason",),
    ),
    SeriesSpec(
        "vllm_suite_ec_local_encodes_total",
        "counter",
        "Items that a consumer encoded itself, by reason; no_reference: none was given.",
        ("reason",),
    ),
    SeriesSpec(
        "vllm_suite_ec_failed_items_total",
        "counter",
        "Items whose request failed because they could not be had, by reason.",
        ("reason",),
    ),
    SeriesSpec("vllm_suite_ec_loads_total", "counter", "Items put into vLLM's encoder cache without encoding."),
    SeriesSpec("vllm_suite_ec_cut_chunks_total", "counter", "Steps that ended a chunk before an item under way."),
    SeriesSpec("vllm_suite_ec_encoded_items_total", "counter", "Items encoded here and stored."),
    SeriesSpec("vllm_suite_ec_encoded_rows_total", "counter", "Embedding rows of those."),
    SeriesSpec(
        "vllm_suite_ec_reused_items_total", "counter", "Items of encode requests that were stored already: no encode."
    ),
    SeriesSpec(
        "vllm_suite_ec_slices_total",
        "counter",
        "Slices of items that encode requests asked for: cut, or the item was encoded whole.",
        ("outcome",),
    ),
    SeriesSpec("vllm_suite_ec_joined_items_total", "counter", "Items fetched in slices; their bytes by peer as ever."),
    SeriesSpec("vllm_suite_ec_pool_hits_total", "counter", "Claims of items that the pool had, by tier.", ("tier",)),
    SeriesSpec("vllm_suite_ec_pool_misses_total", "counter", "Claims of items that the pool had not."),
    SeriesSpec("vllm_suite_ec_pool_evictions_total", "counter", "Items that made room, by tier.", ("tier",)),
    SeriesSpec("vllm_suite_ec_pool_demotions_total", "counter", "Items that moved one tier down.", ("tier",)),
    SeriesSpec("vllm_suite_ec_pool_bytes", "gauge", "Bytes of the pool in use.", ("tier",)),
    SeriesSpec("vllm_suite_ec_pool_capacity_bytes", "gauge", "Bytes of the pool.", ("tier",)),
    SeriesSpec("vllm_suite_ec_pool_items", "gauge", "Items in the pool.", ("tier",)),
    SeriesSpec("vllm_suite_ec_not_stored_total", "counter", "Encoder outputs not stored, by reason.", ("reason",)),
    SeriesSpec("vllm_suite_ec_served_total", "counter", "Claims that ended, by end: read, given_up.", ("end",)),
    SeriesSpec("vllm_suite_ec_claims_refused_total", "counter", "Claims this producer refused.", ("reason",)),
    SeriesSpec("vllm_suite_ec_leases_outstanding", "gauge", "Items pinned by consumers now."),
    SeriesSpec(
        "vllm_suite_ec_contained_faults_total",
        "counter",
        "Faults of the encoder cache that the connector kept from ending the engine.",
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

# `class` is the client's `dler_class`: default where it gave none, other beyond the first `classes.max_labels`.
SCHED: tuple[SeriesSpec, ...] = (
    SeriesSpec("vllm_suite_sched_active", "gauge", "1 where requests are ordered by length, 0 where by another rule."),
    SeriesSpec("vllm_suite_sched_kappa", "gauge", "Rule kappa: seconds that one token of size is worth, now."),
    SeriesSpec("vllm_suite_sched_boost_seconds", "gauge", "Rule boost: scale of the boost, now."),
    SeriesSpec("vllm_suite_sched_queue_length", "gauge", "Requests that wait, those evicted among them.", ("class",)),
    SeriesSpec("vllm_suite_sched_queue_age_seconds", "gauge", "Seconds since the oldest of them came.", ("class",)),
    SeriesSpec(
        "vllm_suite_sched_requests_total",
        "counter",
        "Requests that ended, by end: stop, length, repetition, abort, error.",
        ("class", "end"),
    ),
    SeriesSpec("vllm_suite_sched_output_tokens_total", "counter", "Tokens that ended requests generated.", ("class",)),
    SeriesSpec(
        "vllm_suite_sched_latency_seconds_total", "counter", "Seconds from their arrival to their end.", ("class",)
    ),
    SeriesSpec(
        "vllm_suite_sched_normalised_latency_seconds",
        "gauge",
        "Seconds from arrival to end for each generated token, quantiles of the last 256 requests of a class.",
        ("class", "quantile"),
    ),
    SeriesSpec(
        "vllm_suite_sched_length_error_tokens",
        "gauge",
        "Output tokens expected on arrival minus those generated, quantiles of the last 512 that ended by themselves.",
        ("quantile",),
    ),
    SeriesSpec(
        "vllm_suite_sched_wait_p99_seconds",
        "gauge",
        "99th percentile of waiting to begin, of the last admissions: actual, and in_turn had the order been that of "
        "arrival.",
        ("order",),
    ),
    SeriesSpec("vllm_suite_sched_overtakes_total", "counter", "Requests that began while an older one waited."),
    SeriesSpec("vllm_suite_sched_boosts_total", "counter", "Times that a waiting request moved forward."),
    SeriesSpec(
        "vllm_suite_sched_evictions_total",
        "counter",
        "Running requests that were queued again, by reason: kv_full, reset; unforeseen where no victim was chosen.",
        ("reason",),
    ),
    SeriesSpec("vllm_suite_sched_caps_total", "counter", "Answers that the cap of their class ended.", ("class",)),
    SeriesSpec(
        "vllm_suite_sched_group_stops_total", "counter", "Samples ended because enough of their group had finished."
    ),
    SeriesSpec("vllm_suite_sched_gate_closed_steps_total", "counter", "Steps in which the gate kept a request out."),
    SeriesSpec(
        "vllm_suite_sched_state_total",
        "counter",
        "Readings and writings of the state file (load, save) by outcome: ok, missing, failed.",
        ("what", "outcome"),
    ),
    SeriesSpec(
        "vllm_suite_sched_refused_arguments_total", "counter", "vllm_xargs whose values make no sense.", ("name",)
    ),
    SeriesSpec(
        "vllm_suite_sched_poll_failures_total",
        "counter",
        "Readings of the scheduler's counters that failed: error, timeout.",
        ("reason",),
    ),
)

# Exported by an instance's API server. Roles, outcomes and phases are those of `vllm_suite.roles.state`.
ROLES: tuple[SeriesSpec, ...] = (
    SeriesSpec(
        "vllm_suite_role_switches_total",
        "counter",
        "Attempts to switch the role of this instance, by outcome: switched, back, out.",
        ("source", "target", "outcome"),
    ),
    SeriesSpec(
        "vllm_suite_role_phase_seconds",
        "histogram",
        "Seconds that a phase of an attempt took.",
        ("phase",),
        (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
    ),
)

# Exported by `vllm-suite roles control`.
CONTROLLER: tuple[SeriesSpec, ...] = (
    SeriesSpec("vllm_suite_roles_instances", "gauge", "Ready instances by role.", ("role",)),
    SeriesSpec("vllm_suite_roles_queue", "gauge", "Requests that wait on them.", ("role",)),
    SeriesSpec("vllm_suite_roles_out", "gauge", "Instances that a failed switch left out; they need a restart."),
    SeriesSpec("vllm_suite_roles_looks_total", "counter", "Looks at the fleet: ok, partial, no_router.", ("outcome",)),
    SeriesSpec(
        "vllm_suite_roles_moves_total",
        "counter",
        "Switches asked for, why (start, rule), and the answer: begun, noop, refused, no_answer, dry_run.",
        ("source", "target", "why", "outcome"),
    ),
)
