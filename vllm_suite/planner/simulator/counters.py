"""What a simulated fleet counts beside its requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_suite.planner.plan import Role
from vllm_suite.planner.simulator.encoders import Encoder
from vllm_suite.planner.simulator.routing import Instance
from vllm_suite.planner.simulator.switching import Switched


@dataclass(frozen=True)
class PoolRun:
    """Counters of a pool; tuples have one entry for each engine that ever was in it.

    Attributes:
        busy: seconds in steps.
        steps: engine steps; of encoders, batches.
        present: seconds for which the engine was in the pool.
        preemptions: of jobs.
        blocks: of cache of one engine; 0 for encoders.
        kv_mean, kv_max: share of the pool's blocks that were taken: the mean over time and engines, and the most of any
            engine. While jobs decode their caches are taken to grow evenly.
        transfers, transfer_bytes, transfer_seconds: what the pool's engines pulled: keys and values, and encoders'
            outputs. Seconds are summed over pulls, so pulls side by side count several times.
        waited: seconds that requests waited in the pool's queues, summed.
        encoded, hits: items and slices that were encoded here, and those found in an encoder's token cache.
        overflow: encoders' outputs that had no room in the token cache beside what was yet to be fetched.
    """

    busy: tuple[float, ...]
    steps: tuple[int, ...]
    present: tuple[float, ...] = ()
    preemptions: int = 0
    blocks: int = 0
    kv_mean: float = 0.0
    kv_max: float = 0.0
    transfers: int = 0
    transfer_bytes: float = 0.0
    transfer_seconds: float = 0.0
    waited: float = 0.0
    encoded: int = 0
    hits: int = 0
    overflow: int = 0

    @property
    def utilisation(self) -> float:
        """Share of the time in which an engine of the pool was in a step; 0 where there was no time."""
        present = sum(self.present)
        return sum(self.busy) / present if present else 0.0


@dataclass(frozen=True)
class FleetRun:
    """What a simulation counted.

    Attributes:
        end: seconds until the last request was done.
        pools: by role.
        switches: in the order of their ends.
    """

    end: float
    pools: Mapping[Role, PoolRun]
    switches: tuple[Switched, ...] = ()


def _present(members: Sequence[Instance | Encoder], end: float) -> tuple[float, ...]:
    return tuple(max(0.0, min(member.until, end) - member.since) for member in members)


def pool_run(members: Sequence[Instance], end: float) -> PoolRun:
    """The counters of engines."""
    engines, present = [member.engine for member in members], _present(members, end)
    blocks = engines[0].limits.blocks
    room, most = blocks * sum(present), max(engine.peak for engine in engines) / blocks
    return PoolRun(
        busy=tuple(engine.busy for engine in engines),
        steps=tuple(engine.steps for engine in engines),
        present=present,
        preemptions=sum(engine.preemptions for engine in engines),
        blocks=blocks,
        kv_mean=min(most, sum(engine.tally(max(end, engine.seen)) for engine in engines) / room) if room else 0.0,
        kv_max=most,
        transfers=sum(member.transfers for member in members),
        transfer_bytes=sum(member.transfer_bytes for member in members),
        transfer_seconds=sum(member.transfer_seconds for member in members),
        waited=sum(member.waited for member in members),
    )


def encode_run(encoders: Sequence[Encoder], end: float) -> PoolRun:
    """The counters of encoders."""
    return PoolRun(
        busy=tuple(encoder.busy for encoder in encoders),
        steps=tuple(encoder.steps for encoder in encoders),
        present=_present(encoders, end),
        waited=sum(encoder.waited for encoder in encoders),
        encoded=sum(encoder.encoded for encoder in encoders),
        hits=sum(encoder.hits for encoder in encoders),
        overflow=sum(encoder.overflow for encoder in encoders),
    )
