"""The `kubernetes:` section of a fleet file: what the Helm chart adds to the fleet, read by the chart alone."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vllm_suite.fleet.engine import PositiveInt, Settings

Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
"""A Kubernetes quantity, in quotes where it is a bare number."""
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
Labels = dict[str, str]
Port = Annotated[int, Field(ge=1024, le=65_535)]


class Image(Settings):
    """The container image: vLLM's own with this wheel in it."""

    repository: str = Field(default="vllm-suite", min_length=1, description="image name with its registry")
    tag: str = Field(default="", description="the chart's version where left out")
    digest: str = Field(default="", pattern=r"^(sha256:[0-9a-f]{64})?$", description="in place of the tag")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="when nodes ask the registry"
    )
    pull_secrets: tuple[Name, ...] = Field(default=(), description="names of Secrets")


class ModelVolume(Settings):
    """Where the checkpoint comes from. With neither claim nor image `model` is a hub name and is downloaded."""

    claim: Name | None = Field(default=None, description="PersistentVolumeClaim that holds the checkpoint, read only")
    image: str | None = Field(default=None, description="OCI image or artifact that holds it, as an image volume")
    mount_path: str = Field(default="/models", pattern=r"^/.+", description="`model` is a path below it")
    hub_secret: Name | None = Field(default=None, description="Secret whose key `token` opens gated models")
    cache_claim: Name | None = Field(default=None, description="ReadWriteMany claim that instances download to")
    cache_size: Quantity = Field(default="100Gi", description="limit of each pod's own cache, where there is no claim")

    @model_validator(mode="after")
    def _one_source(self) -> ModelVolume:
        if self.claim and self.image:
            raise ValueError("give claim or image")
        return self


class Resources(Settings):
    """Of one container; GPUs and RDMA devices are added."""

    requests: dict[str, Quantity] = Field(default={}, description="for example {cpu: '8', memory: 64Gi}")
    limits: dict[str, Quantity] = Field(default={}, description="as above; memory has to hold /dev/shm too")


class Scaling(Settings):
    """Size of a pool by its outstanding tokens as the routers count them (encoder tokens for `encode`)."""

    kind: Literal["keda", "hpa"] = Field(description="`hpa` needs an adapter that serves the external metric")
    min_replicas: PositiveInt = Field(default=1, description="instances at least")
    max_replicas: PositiveInt = Field(description="instances at most")
    tokens_per_instance: PositiveInt = Field(description="target for each instance")
    cooldown_s: PositiveInt = Field(default=300, description="before the pool gets smaller")

    @model_validator(mode="after")
    def _range(self) -> Scaling:
        if self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas is below min_replicas")
        return self


class PodSettings(Settings):
    """How pods are made."""

    resources: Resources = Field(default=Resources(), description="requests and limits")
    annotations: Labels = Field(default={}, description="of the pods")
    labels: Labels = Field(default={}, description="of the pods, beside the chart's own")
    node_selector: Labels = Field(default={}, description="labels that a node must have")
    tolerations: tuple[dict[str, Any], ...] = Field(default=(), description="taints that pods bear")
    priority_class: Name | None = Field(default=None, description="PriorityClass")
    runtime_class: Name | None = Field(default=None, description="RuntimeClass, for example nvidia")


class RolePods(PodSettings):
    """Of one role; keys that are given replace the shared ones of `instances`."""

    autoscaling: Scaling | None = Field(default=None, description="in place of `pools.ROLE.replicas`")


class Rdma(Settings):
    """RDMA devices of an instance, for NIXL."""

    resource: str = Field(min_length=1, description="extended resource, for example rdma/ib")
    count: PositiveInt = Field(default=1, description="devices of one pod")
    ipc_lock: bool = Field(default=True, description="add the capability that registering memory may need")


class Drain(Settings):
    """How a pod leaves, seconds. Its grace period is the sum."""

    settle_s: PositiveInt = Field(default=10, description="until routers have taken the pod off their lists")
    finish_s: PositiveInt = Field(default=300, description="for running requests and KV blocks not yet fetched")
    stop_s: PositiveInt = Field(default=30, description="from SIGTERM to SIGKILL")


class RouterPods(PodSettings):
    """The router's pods and Service."""

    replicas: PositiveInt = Field(default=2, description="routers, each with its own view of the load")
    image: Image | None = Field(default=None, description="where it is another one than the instances'")
    service_type: Literal["ClusterIP", "LoadBalancer", "NodePort"] = Field(
        default="ClusterIP", description="how clients outside the cluster come in"
    )
    service_port: Annotated[int, Field(ge=1, le=65_535)] = Field(default=80, description="of the Service")
    service_annotations: Labels = Field(default={}, description="of the Service, for a cloud's load balancer")


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


class ControllerPods(PodSettings):
    """The process that switches roles of `pools.any` by load, where `roles.control` says so."""

    replicas: PositiveInt = Field(default=1, description="of several, one acts: it holds a Lease")
    metrics_port: Port = Field(default=9101, description="its series")


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

    @model_validator(mode="after")
    def _has_secret(self) -> Keys:
        if self.require_api_key and self.existing_secret is None:
            raise ValueError("require_api_key goes with existing_secret; otherwise give router.auth.api_keys")
        return self


class Placement(Settings):
    """Where pods go relative to each other."""

    spread_over: str = Field(default="kubernetes.io/hostname", description="topology key over which a role is spread")
    same_domain: str | None = Field(
        default=None, description="topology key that instances of all roles should share: a fast network's domain"
    )
    same_domain_required: bool = Field(default=False, description="rather wait than leave the domain")


class PoolPods(Settings):
    """Overrides by role."""

    encode: RolePods = Field(default=RolePods(), description="of encode instances")
    prefill: RolePods = Field(default=RolePods(), description="of prefill instances")
    decode: RolePods = Field(default=RolePods(), description="of decode instances")
    any: RolePods = Field(default=RolePods(), description="of any instances")


class KubernetesSpec(Settings):
    """How the chart runs the fleet."""

    device: Literal["gpu", "cpu"] = Field(default="gpu", description="`cpu` sets what `up` sets on a CPU")
    cpu_threads: PositiveInt = Field(default=1, description="compute threads per instance, on CPU")
    image: Image = Field(default=Image(), description="of instances and routers")
    model: ModelVolume = Field(default=ModelVolume(), description="where the checkpoint comes from")
    gpu_resource: str = Field(default="nvidia.com/gpu", description="extended resource of a GPU")
    gpus_per_node: PositiveInt = Field(
        default=8, description="an instance with more becomes a LeaderWorkerSet over several nodes"
    )
    rdma: Rdma | None = Field(default=None, description="RDMA devices of each instance")
    shm_size: Quantity = Field(default="16Gi", description="/dev/shm of each instance; counts as its memory")
    api_port: Port = Field(default=8000, description="of instances")
    side_channel_port: Port = Field(default=15600, description="first NIXL side-channel port of instances")
    item_port: Port = Field(default=16600, description="first port for encoder outputs")
    start_timeout_s: Annotated[int, Field(ge=30)] = Field(default=1800, description="download and loading included")
    run_as: Annotated[int, Field(ge=1)] = Field(default=2000, description="user and group id of all containers")
    surge: bool = Field(
        default=True, description="start a new pod before an old one leaves; without spare GPUs set it to false"
    )
    drain: Drain = Field(default=Drain(), description="how a pod leaves")
    instances: PodSettings = Field(default=PodSettings(), description="pods of all roles")
    pools: PoolPods = Field(default=PoolPods(), description="overrides of `instances` by role")
    router: RouterPods = Field(default=RouterPods(), description="the router's pods and Service")
    gateway: Gateway = Field(default=Gateway(), description="for clients outside the cluster, beside the Service")
    controller: ControllerPods = Field(default=ControllerPods(), description="of role switching")
    discovery: Literal["dns", "endpoints"] = Field(
        default="dns",
        description="how routers find instances: `dns` needs no access to the API server; `endpoints` watches "
        "EndpointSlices there, sees changes at once and knows IPv6",
    )
    placement: Placement = Field(default=Placement(), description="where pods go")
    disruption_budgets: bool = Field(default=True, description="at most one pod of a role is evicted at a time")
    keys: Keys = Field(default=Keys(), description="where the fleet's keys are")
    network_policies: NetworkPolicies = Field(default=NetworkPolicies(), description="who may connect to whom")
    monitoring: Monitoring = Field(default=Monitoring(), description="objects for the Prometheus operator")
    prometheus_url: str = Field(
        default="http://prometheus-operated.monitoring:9090", description="that KEDA asks for tokens"
    )
