"""The rights that a process of the fleet needs at the Kubernetes API: the one table.

The chart makes its Roles from it (`vllm-suite fleet schema` writes files/rbac.yaml), and the tests compare it with the
calls that the code made at an emulated API server.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Component = Literal["router", "controller"]
Names = Literal["", "lease"]


class Resource(NamedTuple):
    """A kind of objects by its place in the API. `group` is empty for the core."""

    group: str
    version: str
    plural: str


SLICES = Resource("discovery.k8s.io", "v1", "endpointslices")
LEASES = Resource("coordination.k8s.io", "v1", "leases")


class Right(NamedTuple):
    """Verbs on a resource, all within the release's namespace.

    `names` limits them: `lease` to the controller's Lease. `create` cannot be limited: its object has no name yet.
    """

    resource: Resource
    verbs: tuple[str, ...]
    names: Names = ""


RIGHTS: dict[Component, tuple[Right, ...]] = {
    # Only with kubernetes.discovery: endpoints.
    "router": (Right(SLICES, ("list", "watch")),),
    "controller": (
        Right(LEASES, ("create",)),
        Right(LEASES, ("get", "update"), "lease"),
    ),
}


def verbs(component: Component) -> set[tuple[str, str, str]]:
    """The table of one component as (API group, resource, verb)."""
    return {(right.resource.group, right.resource.plural, verb) for right in RIGHTS[component] for verb in right.verbs}


def chart_rights() -> dict[str, list[dict[str, Any]]]:
    """The table as the chart reads it."""
    return {
        component: [
            {
                "group": right.resource.group,
                "resource": right.resource.plural,
                "verbs": list(right.verbs),
                "names": right.names,
            }
            for right in rights
        ]
        for component, rights in RIGHTS.items()
    }
