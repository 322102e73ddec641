"""What the planner knows of an accelerator: rates, memory, links, power. Units are in the names; unknown keys fail."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

RATES = ("fp32", "bf16", "fp16", "fp8", "int8", "fp4")
"""Names of the rates of matrix products."""

Positive = Annotated[float, Field(gt=0)]


class HardwareError(ValueError):
    """No such hardware, or its file cannot be used. The text is meant for the person who named it."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Link(_Strict):
    """A connection between two accelerators, in the α–β form: a message takes `latency_us` + bytes over `gb_s`."""

    gb_s: Positive = Field(description="10^9 bytes per second in one direction")
    latency_us: Annotated[float, Field(ge=0)] = Field(description="time of the smallest message, launch included")

    def seconds(self, size: float) -> float:
        """Time of a message of `size` bytes."""
        return self.latency_us * 1e-6 + size / (self.gb_s * 1e9)


class Nic(_Strict):
    """The node's network cards."""

    count: Annotated[int, Field(ge=1)] = Field(description="cards in a node")
    gbit_s: Positive = Field(description="10^9 bits per second of one card in one direction")
    latency_us: Annotated[float, Field(ge=0)] = Field(description="time of the smallest message")


class Node(_Strict):
    """One machine. `nvlink` absent: accelerators talk over PCIe."""

    gpus: Annotated[int, Field(ge=1)] = Field(description="accelerators in a node")
    nvlink: Link | None = Field(default=None, description="between the accelerators of one NVLink domain")
    nvlink_domain: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="accelerators of one NVLink domain; null: those of a node"
    )
    pcie: Link = Field(description="between two accelerators of a node without NVLink, and to the host")
    nic: Nic


class Power(_Strict):
    """Electrical power of one accelerator."""

    tdp_w: Positive = Field(description="watts at full load")
    idle_w: Annotated[float, Field(ge=0)] = Field(description="watts without load, model loaded")


class Device(_Strict):
    """One kind of accelerator in its usual node."""

    name: Annotated[str, Field(min_length=1)]
    kind: Literal["gpu", "cpu"] = "gpu"
    memory_gib: Positive = Field(description="memory that the driver reports, in 2^30 bytes")
    bandwidth_gb_s: Positive = Field(description="peak memory bandwidth, 10^9 bytes per second")
    tflops: dict[str, Positive] = Field(description="dense peak of matrix products by type, 10^12 per second")
    power: Power
    node: Node
    price_per_hour: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="of one accelerator, in any one currency; no default, prices differ too much"
    )
    efficiency: dict[str, float] = Field(
        default_factory=dict,
        description="constants of the roofline for this device; with `matmul` among them it counts as fitted",
    )

    @field_validator("tflops")
    @classmethod
    def _rates(cls, value: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(value) - set(RATES))
        if unknown:
            raise ValueError(f"no such rate: {', '.join(unknown)}; known: {', '.join(RATES)}")
        if "bf16" not in value:
            raise ValueError("the rate bf16 is needed: other types fall back on it")
        return value

    @property
    def memory_bytes(self) -> float:
        """Bytes of memory."""
        return self.memory_gib * 2**30

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.bandwidth_gb_s * 1e9

    def flops(self, kind: str) -> float:
        """Operations per second of a type; of bf16 where the device has no such products, as kernels then widen."""
        return self.tflops.get(kind, self.tflops["bf16"]) * 1e12


class Cluster(_Strict):
    """So many accelerators of one kind, in as few nodes as they fit. Rank r is accelerator r, node after node."""

    device: Device
    gpus: Annotated[int, Field(ge=1)]

    @property
    def nodes(self) -> int:
        """Machines."""
        return -(-self.gpus // self.device.node.gpus)

    def link(self, ranks: range | tuple[int, ...]) -> Link:
        """The slowest link that a group of ranks needs: NVLink, PCIe, or each accelerator's share of the cards."""
        node = self.device.node
        if not ranks:
            raise HardwareError("a link of no ranks was asked for")
        domain = node.nvlink_domain or node.gpus
        if node.nvlink and len({rank // domain for rank in ranks}) == 1:
            return node.nvlink
        if len({rank // node.gpus for rank in ranks}) == 1:
            return node.pcie
        return self.network

    @property
    def network(self) -> Link:
        """Between nodes, as one accelerator sees it while all of its node send; one card at most."""
        node = self.device.node
        cards = min(1.0, node.nic.count / node.gpus)
        return Link(gb_s=cards * node.nic.gbit_s / 8, latency_us=node.nic.latency_us)
