"""From a fleet file to its processes: what `up` and the demos start."""

from __future__ import annotations

from vllm_suite.fleet.launch import Launch, plan_instances
from vllm_suite.fleet.launch_front import (
    WITHDRAWN_FILE,
    controller_fleet,
    plan_controller,
    plan_router,
    router_config,
)
from vllm_suite.fleet.spec import FleetSpec
from vllm_suite.fleet.state_file import write_atomically
from vllm_suite.fleet.supervisor import OnChange, Supervisor


def plan(spec: FleetSpec) -> list[Launch]:
    """Every process of the fleet, the router last. Raises DeviceError, ModelError, FileNotFoundError, KeyFileError, and
    PredictError where the controller could not decide."""
    if spec.roles.control:
        from vllm_suite.roles.follow import rule_of

        rule_of(spec)
    instances = plan_instances(spec)
    router = plan_router(spec, instances)
    return [*instances, *([plan_controller(spec, router)] if spec.roles.control else []), router]


def supervise(spec: FleetSpec, on_change: OnChange | None = None) -> Supervisor:
    """A supervisor for the whole fleet; writes the configuration of router and controller. Errors as `plan`."""
    launches = plan(spec)
    spec.local.log_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(spec.local.log_dir / "router.yaml", router_config(spec, launches[:-1]))
    (spec.local.log_dir / WITHDRAWN_FILE).unlink(missing_ok=True)  # of an earlier fleet that was killed
    if spec.roles.control:
        write_atomically(spec.local.log_dir / "controller.yaml", controller_fleet(spec))
    return Supervisor(launches, spec.local, on_change)
