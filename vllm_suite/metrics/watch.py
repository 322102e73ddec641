"""Series of `vllm-suite plan --watch`."""

from __future__ import annotations

from vllm_suite.metrics.table import SeriesSpec, one_of

PREFIX = "vllm_suite_watch_"
_OF = one_of("of", "plan", "now")
_WHAT = one_of("what", "prompts", "outputs")
_LOOK = one_of("outcome", "ok", "failed")

WATCH: tuple[SeriesSpec, ...] = (
    SeriesSpec(f"{PREFIX}looks_total", "counter", "Looks at Prometheus: ok, failed.", (_LOOK,)),
    SeriesSpec(
        f"{PREFIX}shifts_total",
        "counter",
        "Shifts of traffic that were confirmed, by what shifted.",
        (one_of("what", "rate", "prompts", "outputs"),),
    ),
    SeriesSpec(
        f"{PREFIX}replans_total",
        "counter",
        "Plans made after a shift: changed to, kept the running one, or no_plan meets the targets.",
        (one_of("outcome", "changed", "kept", "no_plan"),),
    ),
    SeriesSpec(
        f"{PREFIX}requests_per_second",
        "gauge",
        "Requests that were finished: in the windows that the plan is for, and in the last ones.",
        (_OF,),
    ),
    SeriesSpec(f"{PREFIX}mean_tokens", "gauge", "Mean lengths in the same windows.", (_OF, _WHAT)),
    SeriesSpec(
        f"{PREFIX}goodput_requests_per_second",
        "gauge",
        "Requests within the targets that are predicted of the running and of the best plan, at the last shift.",
        (one_of("plan", "running", "best"),),
    ),
)
