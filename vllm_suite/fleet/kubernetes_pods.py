"""The parts of `kubernetes:` that say how pods are made: image, model, resources, devices, placement, size."""

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
    cache_size: Quantity = Field(
        default="100Gi",
        description="limit of each pod's /cache: what it compiles, and downloads where there is no cache_claim",
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelVolume:
        if self.claim and self.image:
            raise ValueError("give claim or image")
        return self


class Resources(Settings):
    """Of one container; GPUs and RDMA devices are added."""

    requests: dict[str, Quantity] = Field(
        default={}, description="for example {cpu: '8', memory: 64Gi, ephemeral-storage: 120Gi}"
    )
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
    finish_s: PositiveInt = Field(
        default=300, description="for running requests, and KV blocks and encoder outputs not yet fetched"
    )
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


class ControllerPods(PodSettings):
    """The process that switches roles of `pools.any` by load, where `roles.control` says so."""

    replicas: PositiveInt = Field(default=1, description="of several, one acts: it holds a Lease")
    metrics_port: Port = Field(default=9101, description="its series")


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
