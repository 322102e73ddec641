"""The dashboards: an overview, and one for each capability."""

from __future__ import annotations

from vllm_suite.observability.capabilities import DISAGG, DLER, EPD, ROLES, SWIFTKV
from vllm_suite.observability.grafana import Dashboard, Panel, Query
from vllm_suite.observability.queries import greatest, mean, quantile, rate, rates, tails, total

R, WATCH = "vllm_suite_router", "vllm_suite_watch"
JUDGED = rate(f"{R}_slo_requests_total", "model", 'verdict!="unknown"')
# 0, not nothing, before the first good one.
GOOD = "({} or 0 * {})".format(rate(f"{R}_slo_requests_total", "model", 'verdict="good"'), JUDGED)

GOODPUT = Panel(
    "Goodput: share of requests within the targets",
    (Query(f"{GOOD} / {JUDGED}", "{{model}}"), Query(greatest(f"{R}_slo_attainment_ratio"), "to be")),
    "percentunit",
    description="Targets are `slo` of the fleet file; without them there is nothing to see.",
)
VERDICTS = rates("Requests by verdict", f"{R}_slo_requests_total", "verdict", "reqps")


def _held(name: str, title: str) -> Panel:
    """Measured time to or per token beside the target and what was promised."""
    promised = f"{R}_predicted_{name}_seconds"
    return Panel(
        title,
        (
            Query(quantile(0.5, f"{R}_{name}_seconds"), "p50"),
            Query(quantile(0.99, f"{R}_{name}_seconds"), "p99"),
            Query(greatest(f"{R}_slo_{name}_seconds"), "target"),
            Query(greatest(promised, "share, bound"), "plan {{share}} {{bound}}"),
        ),
        "s",
        description="Of streamed answers. Buckets end at the target and at what was promised.",
    )


TTFT = _held("ttft", "Time to first token")
TPOT = _held("tpot", "Time per output token")

# Of each request; the engines know what of `first_token` was the transfer, and what of `prefill` fetched items.
STAGES = Panel(
    "Mean seconds of a request by stage",
    (Query(f"{rate(f'{R}_stage_seconds_sum', 'stage')} / scalar({rate(f'{R}_request_seconds_count')})", "{{stage}}"),),
    "s",
    stack=True,
    description="queue: the router's and prefill's. first_token: from asking decode to its first byte, transfer too.",
)

OVERVIEW = Dashboard(
    "overview",
    "vllm-suite / Overview",
    "Load, latency by stage, goodput, and what was recovered from.",
    (
        rates("Requests by status", f"{R}_requests_total", "code", "reqps"),
        GOODPUT,
        VERDICTS,
        TTFT,
        TPOT,
        STAGES,
        Panel("Ready instances", (Query(greatest(f"{R}_instances", "role", 'ready="true"'), "{{role}}"),)),
        Panel("Outstanding tokens", (Query(total(f"{R}_outstanding_tokens", "role, instance"), "{{instance}}"),)),
        Panel("Requests inside routers", (Query(total(f"{R}_requests_in_flight"), "in flight"),)),
        tails("Seconds by stage", f"{R}_stage_seconds", "stage"),
        rates("Recoveries", f"{R}_recoveries_total", "step, reason", description="Steps off the straight way."),
        rates("Failed attempts on instances", f"{R}_upstream_errors_total", "stage, kind"),
        rates("Refused by the router", f"{R}_rejected_total", "reason"),
        rates("Answers broken off", f"{R}_stream_errors_total", "reason"),
        rates("Membership", f"{R}_membership_events_total", "event"),
    ),
)

_PLANNED = f"{R}_predicted_requests_per_second"

PLANNER = Dashboard(
    "planner",
    "vllm-suite / Plan and measured",
    "What the plan in the fleet file promised, beside what requests see.",
    (
        TTFT,
        TPOT,
        Panel(
            "Requests per second",
            (Query(rate(f"{R}_requests_total"), "measured"), Query(greatest(_PLANNED), "plan")),
            "reqps",
            description="The promised times are those of the planned rate.",
        ),
        GOODPUT,
        Panel(
            "Error of the planned step times", (Query(greatest(f"{R}_predicted_error_ratio"), "error"),), "percentunit"
        ),
        Panel(
            "Mean tokens of finished requests",
            (
                Query(mean("vllm:request_prompt_tokens"), "prompt"),
                Query(mean("vllm:request_generation_tokens"), "output"),
            ),
            description="What a plan is made for. Prefill counts each prompt once more, with one output token.",
        ),
        Panel(
            "Watch: traffic that the plan is for, and now",
            (Query(greatest(f"{WATCH}_requests_per_second", "of"), "{{of}}"),),
            "reqps",
            description="With `vllm-suite plan --watch-metrics-port` alone, like those beside it.",
        ),
        Panel(
            "Watch: predicted goodput at the last shift",
            (Query(greatest(f"{WATCH}_goodput_requests_per_second", "plan"), "{{plan}}"),),
            "reqps",
        ),
        rates("Watch: plans made", f"{WATCH}_replans_total", "outcome"),
    ),
)

DASHBOARDS: tuple[Dashboard, ...] = (OVERVIEW, DISAGG, EPD, SWIFTKV, DLER, ROLES, PLANNER)
