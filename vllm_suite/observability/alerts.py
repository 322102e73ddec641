"""The alert rules. ``FLEET`` stands for the selector of a fleet, ``ATTAINMENT`` for its `slo.attainment`."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from vllm_suite.metrics.connectors import DEADLINES

R = "vllm_suite_router"
When = Literal["always", "disagg", "epd", "swiftkv", "dler", "slo", "predicted", "controller"]

BURNS = ((5.0, "5m", "1h", "critical"), (2.0, "30m", "6h", "warning"))
"""Times the budget, short and long window, severity. Both have to agree: the long one says that it matters, the
short one that it goes on. With a tenth of the requests as budget, 5 is half of them. A wide budget so many times would
be more than all: the alert also fires where less than half as many are good as should be."""
SPARE = 1.1
"""Promised times hold up to this many times the planned rate."""


class Alert(NamedTuple):
    """One rule.

    Attributes:
        when: the plugin or section of the fleet file without which the rule says nothing and is left out.
        hold: how long the expression has to hold; "" for at once.
        each: with ``role``, one rule for each pool: ROLE and COUNT in the texts stand for its role and its size, ROLES
            for the roles that its instances may have. Those of a pool `any` change theirs, so they are counted together
            with dedicated ones.
        meaning, todo: for the annotation and the page.
    """

    name: str
    expr: str
    meaning: str
    todo: str
    severity: str = "warning"
    when: When = "always"
    hold: str = ""
    each: str = ""
    labels: tuple[tuple[str, str], ...] = ()

    def rule(self) -> dict[str, Any]:
        """As Prometheus reads it."""
        found: dict[str, Any] = {"alert": self.name, "expr": self.expr}
        if self.hold:
            found["for"] = self.hold
        found["labels"] = {"severity": self.severity, **dict(self.labels)}
        found["annotations"] = {"summary": self.meaning, "description": self.todo}
        return found


def _bad(window: str) -> str:
    """Share of judged requests that missed the targets."""
    series = f"{R}_slo_requests_total"
    good = f'sum(rate({series}{{verdict="good",FLEET}}[{window}])) or vector(0)'
    return f'1 - ({good}) / sum(rate({series}{{verdict!="unknown",FLEET}}[{window}]))'


def _burn(factor: float, short: str, long: str, severity: str) -> Alert:
    limit = f"scalar(clamp_max(vector({factor:g} * (1 - ATTAINMENT)), 1 - ATTAINMENT / 2))"
    return Alert(
        "VllmSuiteSloBurn",
        f"({_bad(short)}) > {limit} and ({_bad(long)}) > {limit}",
        f"Requests miss the targets {factor:g} times as often as they may with ATTAINMENT of them to keep both",
        f"Over {short} and over {long}. The overview shows which stage takes the time: scale that, or plan again.",
        severity,
        "slo",
        labels=(("window", long),),
    )


def _left(time: str, share: str) -> str:
    measured = f"histogram_quantile({share}, sum by (le) (rate({R}_{time}_seconds_bucket{{FLEET}}[10m])))"
    promised = f'max({R}_predicted_{time}_seconds{{share="{share}",bound=~"middle|high",FLEET}})'
    return f"{measured} > {promised}"


_RATE = f"sum(rate({R}_requests_total{{FLEET}}[10m]))"
_PLANNED = f"{SPARE:g} * max({R}_predicted_requests_per_second{{FLEET}})"
_LEFT = " or ".join(_left(time, share) for time in ("ttft", "tpot") for share in ("0.5", "0.99"))

ALERTS: tuple[Alert, ...] = (
    Alert(
        "VllmSuitePoolBelowFloor",
        f'(sum(max by (role) ({R}_instances{{role=~"ROLES",ready="true",FLEET}})) or vector(0)) < COUNT',
        "Fewer than COUNT ROLE instances are ready",
        "Routers list fewer ROLE instances than the fleet has; look at the pods that are not ready.",
        hold="5m",
        each="role",
        labels=(("role", "ROLE"),),
    ),
    Alert(
        "VllmSuiteRouterErrors",
        f'sum(rate({R}_requests_total{{code=~"5..",FLEET}}[5m])) / sum(rate({R}_requests_total{{FLEET}}[5m])) > 0.01',
        "More than one request in a hundred fails",
        f"{R}_upstream_errors_total says on which stage.",
        "critical",
        hold="5m",
    ),
    *(_burn(*burn) for burn in BURNS),
    Alert(
        "VllmSuitePredictionLeft",
        f"({_LEFT}) and {_RATE} <= {_PLANNED}",
        "Requests take longer than the plan promised at this rate",
        "A median or 99th percentile is above the band of `predicted`. Traffic is of another shape, or the hardware is "
        "slower than planned with: calibrate and plan again.",
        when="predicted",
        hold="10m",
    ),
    Alert(
        "VllmSuiteRateAbovePlan",
        f"{_RATE} > {_PLANNED}",
        "More requests come than the fleet was planned for",
        "Plan again for the rate of now: `vllm-suite plan --watch` says what it would change.",
        "info",
        "predicted",
        "30m",
    ),
    Alert(
        "VllmSuiteReferencesRefused",
        "sum by (reason) (increase(vllm_suite_kv_refused_total{FLEET}[10m])) > 0",
        "Decode refused references to KV blocks",
        "After a restart of prefill a few with stale_epoch are what the fence is for; bad_signature and foreign_model "
        "point to instances of another fleet or version.",
        when="disagg",
    ),
    Alert(
        "VllmSuiteTransferDeadlineMissed",
        f'sum(increase(vllm_suite_kv_recomputes_total{{reason=~"{"|".join(DEADLINES)}",FLEET}}[10m])) > 0',
        "KV blocks did not arrive in time",
        "Decode computed these prompts itself. One prefill instance that hangs, or a network that is full: compare "
        "vllm_suite_kv_pull_seconds by peer.",
        when="disagg",
    ),
    Alert(
        "VllmSuiteTransfersFail",
        'sum(rate(vllm_suite_kv_pulls_total{outcome!="ok",FLEET}[10m])) / '
        "sum(rate(vllm_suite_kv_pulls_total{FLEET}[10m])) > 0.02",
        "More than two pulls in a hundred do not arrive",
        "Decode computes these prompts itself; vllm_suite_kv_recomputes_total says why.",
        when="disagg",
        hold="5m",
    ),
    Alert(
        "VllmSuiteItemsRefused",
        "sum by (reason) (increase(vllm_suite_ec_refused_total{FLEET}[10m])) > 0",
        "Encoder outputs could not be had from where they were said to be",
        "After a restart of an encoder a few with stale_epoch are normal; no_room: the consumers' pool is too small.",
        when="epd",
    ),
    Alert(
        "VllmSuiteSkippingOff",
        "min(vllm_suite_swiftkv_armed{FLEET}) == 0",
        "A SwiftKV instance computes every layer for prompts",
        "Start it without the flag that its log names.",
        when="swiftkv",
        hold="5m",
    ),
    Alert(
        "VllmSuiteInstanceOut",
        "max(vllm_suite_roles_out{FLEET}) > 0",
        "A failed role switch left an instance out",
        "It takes no requests any more: restart it, and read its log for the phase that failed.",
        "critical",
        "controller",
    ),
    Alert(
        "VllmSuiteControllerAbsent",
        "absent(vllm_suite_roles_looks_total{FLEET}) or "
        'sum(rate(vllm_suite_roles_looks_total{outcome="ok",FLEET}[5m])) == 0',
        "Nobody switches roles",
        "The controller is away, or cannot see the whole fleet (its log says why). Instances keep their roles.",
        when="controller",
        hold="5m",
    ),
)
