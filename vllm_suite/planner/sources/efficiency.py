"""How near kernels come to a device's peaks: the constants of the roofline, each of which a calibration may replace."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_suite.planner.hardware import Device
from vllm_suite.planner.sources.base import FloatArray, SourceError

Share = Annotated[float, Field(gt=0, le=1)]
Micros = Annotated[float, Field(ge=0)]


class Efficiency(BaseModel):
    """Constants of the roofline.

    A product of m rows takes the larger of its operations over `matmul` · m / (m + `half_rows`) of the peak and its
    bytes over `memory` of the bandwidth, plus `kernel_us`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    matmul: Share = Field(default=0.75, description="share of the peak that large products reach")
    half_rows: Annotated[float, Field(ge=0)] = Field(
        default=80.0, description="rows at which a product reaches half of that; of one expert where there are several"
    )
    memory: Share = Field(default=0.9, description="share of the bandwidth that weights are read at")
    prefill_attention: Share = Field(default=0.45, description="share of the peak that attention over a prompt reaches")
    decode_attention: Share = Field(default=0.8, description="share of the bandwidth that a cache is read at")
    reread: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="in steps with prompts: share of a KV head's further query heads that read its cache anew",
    )
    kernel_us: Micros = Field(default=2.5, description="shortest kernel, and what each adds to its roof")
    step_us: Micros = Field(default=500.0, description="between two steps: scheduler, input tensors, host")
    sequence_us: Micros = Field(default=2.0, description="of that, for each sequence")
    imbalance: Annotated[float, Field(ge=1)] = Field(
        default=1.2, description="rows of the busiest rank's experts over the mean, with experts spread over ranks"
    )

    @classmethod
    def of(cls, device: Device, **changes: Any) -> Efficiency:
        """The defaults, a device's own constants over them, and `changes` over both. Raises SourceError."""
        usual = {"kernel_us": 5.0, "matmul": 0.6, "memory": 0.7, "half_rows": 4.0} if device.kind == "cpu" else {}
        try:
            return cls(**{**usual, **device.efficiency, **changes})
        except ValidationError as error:
            lines = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise SourceError(f"efficiency of {device.name}: {lines}") from error

    def product(
        self, flops: FloatArray, rows: FloatArray, size: FloatArray, peak: float, bandwidth: float
    ) -> FloatArray:
        """Seconds of a product.

        Args:
            flops: its operations.
            rows: rows of one matrix, above 0.
            size: bytes that are read and written.
            peak: operations per second.
            bandwidth: bytes per second.
        """
        compute = flops * (rows + self.half_rows) / rows / (peak * self.matmul)
        return np.maximum(compute, size / (bandwidth * self.memory)) + self.kernel_us * 1e-6
