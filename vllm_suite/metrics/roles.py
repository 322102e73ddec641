"""Series of role switching: of an instance (`ROLES`) and of the controller (`CONTROLLER`)."""

from __future__ import annotations

from vllm_suite.metrics.table import SeriesSpec, one_of

SOURCE = one_of("source", "encode", "prefill", "decode", "any")
TARGET = one_of("target", "encode", "prefill", "decode", "any")
ROLE = one_of("role", "encode", "prefill", "decode", "any")
PHASE = one_of("phase", "closing", "drained", "switching", "verified", "restoring")

_ANSWER = one_of("outcome", "begun", "noop", "refused", "no_answer", "dry_run")
_WHY = one_of("why", "again", "start", "rule")
# After a start an instance of role `any` gets one; the rule takes those, or one of another role.
_MOVES = tuple(
    (source, target, why)
    for why in _WHY.values
    for source in SOURCE.values
    for target in TARGET.values
    if target not in ("any", source) and (why == "rule" or source == "any")
)

# Exported by an instance's API server. Roles, outcomes and phases are those of `vllm_suite.roles.state`.
ROLES: tuple[SeriesSpec, ...] = (
    SeriesSpec(
        "vllm_suite_role_switches_total",
        "counter",
        "Attempts to switch the role of this instance, by outcome: switched, back, out.",
        (
            SOURCE,
            TARGET,
            one_of("outcome", "switched", "back", "out"),
        ),
    ),
    SeriesSpec(
        "vllm_suite_role_phase_seconds",
        "histogram",
        "Seconds that a phase of an attempt took.",
        (PHASE,),
        (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
    ),
    SeriesSpec(
        "vllm_suite_role_given_back_total",
        "counter",
        "Queued requests that a switch sent back to the router, by stage; nothing of them was begun.",
        (one_of("stage", "encode", "prefill", "decode"),),
    ),
)

# Exported by `vllm-suite roles control`.
CONTROLLER: tuple[SeriesSpec, ...] = (
    SeriesSpec("vllm_suite_roles_instances", "gauge", "Ready instances by role.", (ROLE,)),
    SeriesSpec("vllm_suite_roles_queue", "gauge", "Requests that wait on them.", (ROLE,)),
    SeriesSpec("vllm_suite_roles_out", "gauge", "Instances that a failed switch left out; they need a restart."),
    SeriesSpec("vllm_suite_roles_leader", "gauge", "1 while this controller holds the Lease; with --lease alone."),
    SeriesSpec("vllm_suite_roles_demand", "gauge", "Requests per second that come, and those that wait over a window."),
    SeriesSpec("vllm_suite_roles_goodput", "gauge", "Requests per second within the targets that are predicted now."),
    SeriesSpec("vllm_suite_roles_goodput_best", "gauge", "The same with the best single switch."),
    SeriesSpec(
        "vllm_suite_roles_looks_total",
        "counter",
        "Looks at the fleet: ok, partial, no_router; no look: follower, no_api.",
        (one_of("outcome", "ok", "partial", "no_router", "follower", "no_api"),),
    ),
    SeriesSpec(
        "vllm_suite_roles_scalings_total",
        "counter",
        "Instances more or fewer asked for; changing: the workload is not of the fleet's size yet.",
        (one_of("direction", "up", "down"), one_of("outcome", "scaled", "no_api", "changing")),
    ),
    SeriesSpec(
        "vllm_suite_roles_moves_total",
        "counter",
        "Switches asked for, why (again, start, rule), and the answer: begun, noop, refused, no_answer, dry_run.",
        (
            SOURCE,
            TARGET,
            _WHY,
            _ANSWER,
        ),
        known=tuple((*move, outcome) for move in _MOVES for outcome in _ANSWER.values),
    ),
    SeriesSpec(
        "vllm_suite_roles_without_give_back_total",
        "counter",
        "Switches asked for again without give_back, which the instance does not know: its version is older.",
    ),
)
