"""The rights that a process of the fleet needs at the Kubernetes API: the one table.

The chart makes its Roles from it (`vllm-suite fleet schema` writes files/rbac.yaml), and the tests compare it with the
calls that the code made at an emulated API server.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Component = Literal["router", "controller"]
Names = Literal["", "lease", "any"]


class Resource(NamedTuple):
    """A kind of objects by its place in the API. `group` is empty for the core."""

    group: str
    version: str
    plural: str


SLICES = Resource("discovery.k8s.io", "v1", "endpointslices")
LEASES = Resource("coordination.k8s.io", "v1", "leases")
DEPLOYMENTS = Resource("apps", "v1", "deployments")
LEADER_WORKER_SETS = Resource("leaderworkerset.x-k8s.io", "v1", "leaderworkersets")


class Right(NamedTuple):
    """Verbs on a resource, all within the release's namespace.

    `names` limits them: `lease` to the controller's Lease, `any` to the workload of `pools.any`.
    `create` cannot be limited, since its object has no name yet.
    """

    resource: Resource
    verbs: tuple[str, ...]
    names: Names = ""
    sub: str = ""


RIGHTS: dict[Component, tuple[Right, ...]] = {
    # Only with kubernetes.discovery: endpoints.
    "router": (Right(SLICES, ("list", "watch")),),
    "controller": (
        Right(LEASES, ("create",)),
        Right(LEASES, ("get", "update"), "lease"),
        # Only with roles.scale, and of the two the one that pools.any is.
        Right(DEPLOYMENTS, ("patch",), "any", "scale"),
        Right(LEADER_WORKER_SETS, ("patch",), "any", "scale"),
    ),
}


def verbs(component: Component) -> set[tuple[str, str, str]]:
    """The table of one component as (API group, resource with its subresource, verb)."""
    return {
        (right.resource.group, right.resource.plural + (f"/{right.sub}" if right.sub else ""), verb)
        for right in RIGHTS[component]
        for verb in right.verbs
    }


def chart_rights() -> dict[str, list[dict[str, Any]]]:
    """The table as the chart reads it."""
    return {
        component: [
            {
                "group": right.resource.group,
                "resource": right.resource.plural + (f"/{right.sub}" if right.sub else ""),
                "verbs": list(right.verbs),
                "names": right.names,
            }
            for right in rights
        ]
        for component, rights in RIGHTS.items()
    }
