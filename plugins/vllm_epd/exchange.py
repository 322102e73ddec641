"""What the scheduler's half tells the workers' halves in a step, inside vLLM's own metadata."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_suite.compat.ec import ECConnectorMetadata


@dataclass(frozen=True, slots=True)
class Load:
    """One item that goes into the encoder cache in this step: ``[rows, width]``, fetched under ``ticket``."""

    identifier: str
    ticket: int
    rows: int
    width: int


@dataclass(slots=True)
class StepPlan(ECConnectorMetadata):
    """Scheduler to workers.

    Attributes:
        loads: items to put into the encoder cache.
        publish: items that requests of this step will refer to: leased anew, or stored again from the encoder cache.
        forget: drop first what is stored; it was made with other weights.
        store: encoder outputs of this step to store; None for all.
    """

    loads: list[Load] = field(default_factory=list)
    publish: list[str] = field(default_factory=list)
    store: set[str] | None = None
    forget: bool = False
