"""The parts of `kubernetes:` that say who comes in: gateway, network policies, keys, and who looks at the series."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vllm_suite.fleet.engine import Settings
from vllm_suite.fleet.kubernetes_pods import Labels, Name


class GatewayParent(Settings):
    """A Gateway that there is already."""

    name: Name = Field(description="of the Gateway")
    namespace: Name | None = Field(default=None, description="where it is elsewhere")
    section: Name | None = Field(default=None, description="its listener; all where left out")


class EndpointPicker(Settings):
    """An endpoint picker (Gateway API Inference Extension) that chooses among routers."""

    service: Name = Field(description="its Service")
    port: Annotated[int, Field(ge=1, le=65_535)] = Field(default=9002, description="of that Service")
    failure_mode: Literal["FailOpen", "FailClose"] = Field(
        default="FailOpen", description="without the picker: any router, or none"
    )


class Gateway(Settings):
    """A way in through the Gateway API: `/v1` alone, with the router's own time limit."""

    parents: Annotated[tuple[GatewayParent, ...], Field(max_length=32)] = Field(
        default=(), description="Gateways that an HTTPRoute attaches to; no route where empty"
    )
    hostnames: Annotated[tuple[str, ...], Field(max_length=16)] = Field(
        default=(), description="of requests; all where empty"
    )
    picker: EndpointPicker | None = Field(
        default=None, description="makes the routers an InferencePool, to which the route leads"
    )


class NetworkPolicies(Settings):
    """Who may connect to whom."""

    enabled: bool = Field(default=True, description="make NetworkPolicies")
    clients: tuple[dict[str, Any], ...] = Field(
        default=(), description="NetworkPolicyPeers that may reach the router; all where left out"
    )
    metrics_from: tuple[dict[str, Any], ...] = Field(
        default=(), description="NetworkPolicyPeers that may scrape; they reach the whole API port of instances"
    )
    restrict_egress: bool = Field(default=True, description="pods reach each other, DNS and what they download from")


class Monitoring(Settings):
    """Objects for the Prometheus operator; made only where the cluster has its API."""

    enabled: bool = Field(default=True, description="make monitors and alerts")
    labels: Labels = Field(default={}, description="that the operator selects by")
    interval: str = Field(default="15s", pattern=r"^[0-9]+(s|m)$", description="between two scrapes")
    rules: bool = Field(default=True, description="alerts")
    dashboards: bool = Field(default=True, description="ConfigMaps with Grafana dashboards")
    dashboard_labels: Labels = Field(
        default={"grafana_dashboard": "1"}, description="that Grafana's sidecar selects dashboards by"
    )


class Keys(Settings):
    """Where the fleet's keys are."""

    existing_secret: Name | None = Field(
        default=None,
        description="Secret with upstream-key, control-key and fleet-key, and api-key where clients need one; "
        "otherwise the chart makes one and keeps it over upgrades",
    )
    require_api_key: bool = Field(default=False, description="existing_secret has an api-key, which clients need")
    client_secret: Name | None = Field(
        default=None,
        description="another Secret, which lists keys of clients; the api-key is then for the fleet's own questions",
    )
    client_secret_key: Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)] = Field(
        default="api-keys", description="key of that Secret whose text has a client's key on each line"
    )

    @model_validator(mode="after")
    def _has_secret(self) -> Keys:
        if self.require_api_key and self.existing_secret is None:
            raise ValueError("require_api_key goes with existing_secret; otherwise give router.auth.api_keys")
        if self.client_secret is not None and self.existing_secret is not None and not self.require_api_key:
            raise ValueError(
                "client_secret: existing_secret needs an api-key too (require_api_key: true), which probes, helm test "
                "and Prometheus send"
            )
        return self
