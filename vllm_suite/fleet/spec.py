"""`FleetSpec`: one file that says which instances there are and how they are started.

Everything outside `local` and `kubernetes` holds wherever the fleet runs; `local` is read by `vllm-suite up` alone,
`kubernetes` by the Helm chart, whose values file this file is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from vllm_suite import catalog
from vllm_suite.fleet.engine import EngineSpec, PositiveInt, Settings
from vllm_suite.fleet.kubernetes import KubernetesSpec
from vllm_suite.fleet.predicted import PredictedSpec
from vllm_suite.fleet.slo import SloSpec
from vllm_suite.fleet.tracing import TracingSpec
from vllm_suite.fleet.units import DurationMs
from vllm_suite.roles.config import RolesSpec
from vllm_suite.router.config import RouterConfig

PoolRole = Literal["encode", "prefill", "decode", "any"]
POOL_ROLES: tuple[PoolRole, ...] = ("encode", "prefill", "decode", "any")
ENCODING_ROLES: tuple[PoolRole, ...] = ("encode", "any")
"""With plugin `epd` these run an encoder for others and serve its outputs on a port of their own."""

Port = Annotated[int, Field(ge=1, le=65_535)]


class PoolSpec(Settings):
    """Instances of one role, all alike."""

    replicas: Annotated[int, Field(ge=0, le=1024)] = Field(default=1, description="number of instances")
    engine: EngineSpec = Field(default=EngineSpec(), description="overrides of the shared `engine`")
    env: dict[str, str] = Field(default={}, description="overrides of the shared `env`")


class Pools(Settings):
    """The pools by role. A pool that is left out has no instances."""

    encode: PoolSpec | None = Field(
        default=None, description="run the vision or audio encoder alone; needs plugin `epd`"
    )
    prefill: PoolSpec | None = Field(default=None, description="compute prompts and hand their KV blocks over")
    decode: PoolSpec | None = Field(default=None, description="pull KV blocks and generate")
    any: PoolSpec | None = Field(default=None, description="do either, per request")

    def items(self) -> Iterator[tuple[PoolRole, PoolSpec]]:
        """Pools that are there, in the order of a request."""
        for role in POOL_ROLES:
            pool: PoolSpec | None = getattr(self, role)
            if pool is not None:
                yield role, pool


class RestartSpec(Settings):
    """What happens to an instance that ended without being asked to."""

    enabled: bool = Field(default=True, description="start it again, on the same ports")
    first_delay: DurationMs = Field(default=1000.0, description="before the first restart; doubles each time")
    max_delay: DurationMs = Field(default=60_000.0, description="upper bound of that delay")
    reset_after: DurationMs = Field(default=300_000.0, description="ready for so long: the delay starts anew")
    max_restarts: Annotated[int, Field(ge=0)] = Field(
        default=10, description="in a row without `reset_after`; then the instance stays down"
    )

    def delay_s(self, restarts: int) -> float:
        """Seconds to wait before restart number `restarts` (from 0)."""
        return float(min(self.max_delay, self.first_delay * 2.0 ** min(restarts, 30))) / 1000


class LocalSpec(Settings):
    """How `vllm-suite up` runs the fleet on this machine."""

    host: str = Field(
        default="127.0.0.1", min_length=1, description="address that instances bind and announce to each other"
    )
    first_port: Port = Field(default=8100, description="API port of the first instance; the others follow")
    first_side_channel_port: Port = Field(
        default=15600, description="NIXL side-channel port of the first instance; the others follow"
    )
    controller_port: Port = Field(default=9300, description="metrics of the controller; with `roles.control` alone")
    first_item_port: Port = Field(
        default=16600, description="port for encoder outputs of the first instance that encodes; the others follow"
    )
    device: Literal["auto", "cpu", "gpu"] = Field(
        default="auto", description="`auto`: gpu where an NVIDIA driver answers"
    )
    gpus: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, description="indices to use; all where left out"
    )
    share_gpus: bool = Field(default=False, description="several instances on one GPU where there are too few")
    cpu_threads: PositiveInt = Field(default=1, description="compute threads per instance, on CPU")
    parallel_starts: PositiveInt | None = Field(
        default=None, description="instances that start at the same time; one per core where left out"
    )
    start_timeout: DurationMs = Field(default=600_000.0, description="from the start of an instance to ready")
    stop_timeout: DurationMs = Field(default=20_000.0, description="from SIGTERM to SIGKILL")
    restart: RestartSpec = Field(default=RestartSpec(), description="of instances that ended by themselves")
    log_dir: Path = Field(default=Path("build/fleet"), description="one log per instance, and the fleet's state")

    @field_validator("host")
    @classmethod
    def _not_a_wildcard(cls, host: str) -> str:
        if host in ("0.0.0.0", "::", "*"):
            raise ValueError("peers cannot connect to a wildcard address; give one of this machine's own")
        return host


class Placed(NamedTuple):
    """One instance of a fleet: its API port, and the first of its ports for KV hand-over and for encoder outputs.

    `items` is None where the instance encodes nothing for others.
    """

    name: str
    role: PoolRole
    pool: PoolSpec
    api: int
    side: int
    items: int | None


class FleetSpec(Settings):
    """The whole fleet."""

    name: str = Field(default="fleet", pattern=r"^[a-z0-9]([-a-z0-9]{0,40}[a-z0-9])?$", description="prefix of names")
    model: str = Field(min_length=1, description="checkpoint folder or hub name")
    served_model_name: str | None = Field(default=None, description="name in requests; `model` where left out")
    plugins: tuple[str, ...] = Field(default=("disagg",), description="suite plugins of every instance")
    engine: EngineSpec = Field(default=EngineSpec(), description="vLLM flags of every instance")
    env: dict[str, str] = Field(default={}, description="environment of every instance")
    pools: Pools = Field(description="instances by role")
    router: RouterConfig = Field(
        default=RouterConfig(), description="settings of the router; `up` fills membership.static"
    )
    roles: RolesSpec = Field(default=RolesSpec(), description="role switching in `pools.any`; read by `roles control`")
    slo: SloSpec = Field(default=SloSpec(), description="targets per request")
    predicted: PredictedSpec | None = Field(
        default=None, description="what `vllm-suite plan` said of this fleet; alerts compare it with what is measured"
    )
    tracing: TracingSpec | None = Field(
        default=None, description="OpenTelemetry spans of the router and of every instance, joined by request"
    )
    local: LocalSpec = Field(default=LocalSpec(), description="read by `vllm-suite up` alone")
    kubernetes: KubernetesSpec = Field(default=KubernetesSpec(), description="read by the Helm chart alone")

    @field_validator("plugins")
    @classmethod
    def _known_plugins(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return catalog.parse_selection(",".join(names))

    @field_validator("router")
    @classmethod
    def _router_of_a_file(cls, router: RouterConfig) -> RouterConfig:
        if len(router.auth.api_keys) > 1:
            raise ValueError("auth.api_keys: one key can be given here; put several into api_key_file")
        if router.membership.withdrawn_file is not None:
            raise ValueError("membership.withdrawn_file: `up` writes it, of its own instances; leave it out")
        if router.slo != SloSpec() or router.predicted is not None or router.tracing is not None:
            raise ValueError(
                "slo, predicted and tracing stand at the top of a fleet file; the router gets them from it"
            )
        return router

    @model_validator(mode="after")
    def _can_serve(self) -> FleetSpec:
        counts = {role: pool.replicas for role, pool in self.pools.items()}
        if not sum(counts.values()):
            raise ValueError("pools: the fleet has no instance")
        if not counts.get("decode") and not counts.get("any"):
            alone = "encode" if not counts.get("prefill") else "prefill"
            raise ValueError(f"pools: {alone} instances need a decode or an any instance to hand over to")
        start, able = self.roles.start, counts.get("any", 0)
        if start.encode + start.prefill + start.decode > able:
            wanted = ", ".join(f"{role} {start.of(role)}" for role in ("encode", "prefill", "decode"))
            raise ValueError(f"roles.start: {wanted} of the {able} instances in pools.any")
        if start.encode and "epd" not in self.plugins:
            raise ValueError(f"roles.start.encode: encoding needs plugin epd; plugins is {list(self.plugins)}")
        if self.roles.control and not able:
            raise ValueError("roles.control: pools.any has no instance whose role could change")
        self._stages_hand_over(encoders=bool(counts.get("encode")))
        if counts.get("encode"):
            self._encoders_have_consumers()
        return self

    def _stages_hand_over(self, encoders: bool) -> None:
        # Both would be refused by the engine as well, minutes later.
        for role, pool in self.pools.items():
            where = f"pools.{role}: pipeline_parallel_size"
            if not pool.replicas or (self.engine.overridden_by(pool.engine).pipeline_parallel_size or 1) == 1:
                continue
            if role == "decode" and "disagg" in self.plugins:
                raise ValueError(
                    f"{where}: vLLM's NIXL connector takes no pipeline stages on decode; use tensor_parallel_size"
                )
            if encoders and "epd" in self.plugins:
                raise ValueError(f"{where}: encoder outputs are not taken by pipeline stages; use tensor_parallel_size")

    def _encoders_have_consumers(self) -> None:
        if "epd" not in self.plugins:
            raise ValueError(f"pools.encode: encoder instances need plugin epd; plugins is {list(self.plugins)}")
        for role, pool in self.pools.items():
            args = self.engine.overridden_by(pool.engine).args
            if pool.replicas and "--language-model-only" in args:
                raise ValueError(
                    f"pools.{role}: --language-model-only refuses media, so there is nothing for pools.encode to encode"
                )

    @model_validator(mode="after")
    def _ports_apart(self) -> FleetSpec:
        owner: dict[int, str] = {}
        for port, what in self.ports():
            if port > 65_535:
                raise ValueError(f"local: {what} would get port {port}; choose a lower first port")
            if port in owner:
                raise ValueError(f"port {port} is both {owner[port]} and {what}; move local.first_port, "
                                 "local.first_side_channel_port, local.first_item_port or router.port")  # fmt: skip
            owner[port] = what
        return self

    def width(self, pool: PoolSpec) -> int:
        """Data-parallel ranks of an instance; vLLM adds the index of the rank to each port of a side channel."""
        return self.engine.overridden_by(pool.engine).data_parallel_size or 1

    def instances(self) -> Iterator[Placed]:
        """Every instance with its ports."""
        api, side = self.local.first_port, self.local.first_side_channel_port
        items = self.local.first_item_port
        for role, pool in self.pools.items():
            width = self.width(pool)
            encodes = role in ENCODING_ROLES and "epd" in self.plugins
            for index in range(pool.replicas):
                yield Placed(f"{self.name}-{role}-{index}", role, pool, api, side, items if encodes else None)
                api, side, items = api + 1, side + width, items + (width if encodes else 0)

    def ports(self) -> Iterator[tuple[int, str]]:
        """Every port the fleet listens on here, with what listens there (0, any free one, is left out)."""
        if self.router.port:
            yield self.router.port, "the router"
        if self.roles.control:
            yield self.local.controller_port, "the metrics of the controller"
        for one in self.instances():
            yield one.api, f"the API of {one.name}"
            for rank in range(self.width(one.pool)):
                yield one.side + rank, f"the side channel of {one.name}"
                if one.items is not None:
                    yield one.items + rank, f"the encoder outputs of {one.name}"
