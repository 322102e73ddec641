"""The `kubernetes:` section of a fleet file: what the Helm chart adds to the fleet, read by the chart alone."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vllm_suite.fleet.engine import PositiveInt, Settings
from vllm_suite.fleet.kubernetes_access import Gateway, Keys, Monitoring, NetworkPolicies
from vllm_suite.fleet.kubernetes_pods import (
    ControllerPods,
    Drain,
    Image,
    ModelVolume,
    Placement,
    PodSettings,
    PoolPods,
    Port,
    Quantity,
    Rdma,
    RouterPods,
)


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
    tmp_size: Quantity = Field(default="8Gi", description="limit of /tmp of each pod, on its node's disk")
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
