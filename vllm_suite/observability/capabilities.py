"""A dashboard for each capability."""

from __future__ import annotations

from vllm_suite.observability.grafana import Dashboard, Panel, Query
from vllm_suite.observability.queries import greatest, rate, rates, tails, total

R, KV, EC = "vllm_suite_router", "vllm_suite_kv", "vllm_suite_ec"
SWIFT, SCHED, CONTROL = "vllm_suite_swiftkv", "vllm_suite_sched", "vllm_suite_roles"

DISAGG = Dashboard(
    "disagg",
    "vllm-suite / Prefill and decode",
    "KV blocks handed over: how many, how fast, and what went wrong.",
    (
        rates("Decisions", f"{R}_decisions_total", "path, reason", "reqps"),
        rates("Pulls", f"{KV}_pulls_total", "outcome"),
        rates("Bytes pulled", f"{KV}_pull_bytes_total", "direction, peer", "Bps"),
        tails("Seconds of a pull", f"{KV}_pull_seconds"),
        tails("Seconds by stage on instances", f"{KV}_stage_seconds", "stage"),
        tails("Prefill attempts", f"{R}_prefill_seconds"),
        rates("Prompts computed by decode instead", f"{KV}_recomputes_total", "reason"),
        rates("References refused", f"{KV}_refused_total", "reason"),
        rates("Contained faults", f"{KV}_contained_faults_total", "fault"),
        Panel("Leases outstanding", (Query(total(f"{KV}_leases_outstanding", "instance"), "{{instance}}"),)),
        rates("Leases by end", f"{KV}_leases_total", "end"),
        tails("Seconds that blocks were held", f"{KV}_held_seconds"),
        Panel(
            "KV cache in use", (Query(greatest("vllm:kv_cache_usage_perc", "instance"), "{{instance}}"),), "percentunit"
        ),
        rates("Preemptions", "vllm:num_preemptions_total", "instance"),
        Panel(
            "Requests of engines",
            (
                Query(total("vllm:num_requests_running", "instance"), "running {{instance}}"),
                Query(total("vllm:num_requests_waiting", "instance"), "waiting {{instance}}"),
            ),
        ),
    ),
)

EPD = Dashboard(
    "epd",
    "vllm-suite / Encoders",
    "Items encoded elsewhere: demand, hand-over, and the pool that keeps them.",
    (
        rates("Items", f"{R}_encode_items_total", "modality, outcome"),
        rates("Encoder tokens demanded", f"{R}_encode_tokens_total", "modality"),
        rates("Requests with media", f"{R}_encode_requests_total", "mode", "reqps"),
        tails("Calls to encoders", f"{R}_encode_call_seconds"),
        tails("Wait for room on an encoder", f"{R}_encode_queue_seconds"),
        tails("What the stage took of requests", f"{R}_encode_request_seconds"),
        rates("Fetches", f"{EC}_fetches_total", "outcome"),
        rates("Bytes fetched", f"{EC}_fetch_bytes_total", "peer", "Bps"),
        tails("Seconds of a fetch", f"{EC}_fetch_seconds"),
        rates("Encoded by consumers", f"{EC}_local_encodes_total", "reason"),
        rates("References refused", f"{EC}_refused_total", "reason"),
        rates("Contained faults", f"{EC}_contained_faults_total", "fault"),
        Panel(
            "Pool: hits and misses",
            (
                Query(rate(f"{EC}_pool_hits_total", "tier"), "hit {{tier}}"),
                Query(rate(f"{EC}_pool_misses_total"), "miss"),
            ),
        ),
        Panel(
            "Pool: share in use",
            (Query(f"{total(f'{EC}_pool_bytes', 'tier')} / {total(f'{EC}_pool_capacity_bytes', 'tier')}", "{{tier}}"),),
            "percentunit",
        ),
        rates("Pool: items that made room", f"{EC}_pool_evictions_total", "tier"),
    ),
)

SWIFTKV = Dashboard(
    "swiftkv",
    "vllm-suite / SwiftKV",
    "Prompt tokens that skip the later layers.",
    (
        Panel("Armed", (Query(greatest(f"{SWIFT}_armed", "instance"), "{{instance}}"),)),
        Panel("Share of tokens skipped", (Query(greatest(f"{SWIFT}_skip_ratio", "instance"), "{{instance}}"),),
              "percentunit"),
        Panel(
            "Tokens",
            (
                Query(rate(f"{SWIFT}_head_tokens_total"), "head"),
                Query(rate(f"{SWIFT}_tail_rows_total"), "tail"),
                Query(rate(f"{SWIFT}_prompt_tokens_total"), "prompt"),
                Query(rate(f"{SWIFT}_skipped_tokens_total"), "skipped"),
            ),
        ),
        Panel("Steps", (Query(rate(f"{SWIFT}_steps_total"), "steps"),)),
        rates("Counters that could not be read", f"{SWIFT}_poll_failures_total", "reason"),
    ),
)  # fmt: skip

DLER = Dashboard(
    "dler",
    "vllm-suite / Length-aware scheduling",
    "The order of requests by expected length, and what it costs those that wait.",
    (
        Panel("Ordered by length", (Query(greatest(f"{SCHED}_active", "instance"), "{{instance}}"),)),
        Panel("Waiting requests", (Query(total(f"{SCHED}_queue_length", "class"), "{{class}}"),)),
        Panel("Age of the oldest", (Query(greatest(f"{SCHED}_queue_age_seconds", "class"), "{{class}}"),), "s"),
        Panel(
            "Seconds per token by class",
            (Query(greatest(f"{SCHED}_normalised_latency_seconds", "class, share"), "{{class}} {{share}}"),),
            "s",
        ),
        Panel(
            "Waiting to begin, 99th percentile",
            (Query(greatest(f"{SCHED}_wait_p99_seconds", "order"), "{{order}}"),),
            "s",
            description="in_turn: had the order been that of arrival.",
        ),
        Panel("Error of expected lengths", (Query(greatest(f"{SCHED}_length_error_tokens", "share"), "{{share}}"),)),
        rates("Requests by end", f"{SCHED}_requests_total", "class, end", "reqps"),
        Panel(
            "Order changed",
            (
                Query(rate(f"{SCHED}_overtakes_total"), "overtaken"),
                Query(rate(f"{SCHED}_boosts_total"), "moved forward"),
            ),
        ),
        rates("Evictions", f"{SCHED}_evictions_total", "reason"),
    ),
)

ROLES = Dashboard(
    "roles",
    "vllm-suite / Roles",
    "Instances by role, and the switches between roles.",
    (
        Panel("Ready instances", (Query(greatest(f"{CONTROL}_instances", "role"), "{{role}}"),)),
        Panel("Requests that wait", (Query(greatest(f"{CONTROL}_queue", "role"), "{{role}}"),)),
        Panel("Instances left out", (Query(greatest(f"{CONTROL}_out"), "out"),)),
        rates("Looks of the controller", f"{CONTROL}_looks_total", "outcome"),
        # Rare, so a rate shows little. Most of these never happen.
        Panel(
            "Switches asked for, since the controller began",
            (
                Query(
                    total(f"{CONTROL}_moves_total", "source, target, why, outcome") + " > 0",
                    "{{source}} to {{target}}, {{why}}: {{outcome}}",
                ),
            ),
        ),
        Panel(
            "Attempts on instances, since they began",
            (
                Query(
                    total("vllm_suite_role_switches_total", "source, target, outcome"),
                    "{{source}} to {{target}}: {{outcome}}",
                ),
            ),
        ),
        tails("Seconds of a phase", "vllm_suite_role_phase_seconds", "phase"),
    ),
)
