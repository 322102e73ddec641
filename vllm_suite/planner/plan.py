"""What the planner chooses: pools of engines, how each is cut, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from vllm_suite.planner.models import Parallel, Quantization

Role = Literal["encode", "prefill", "decode", "any"]
"""The roles of a fleet file. `any` encodes where there is no `encode` pool, and prefills and decodes."""


_WHOLE = Parallel()


class PlanError(ValueError):
    """A plan that cannot be run; the text says which number and why."""


@dataclass(frozen=True)
class PoolPlan:
    """Engines of one role, all alike.

    Attributes:
        count: engines.
        max_num_seqs, max_num_batched_tokens: vLLM's settings of each engine.
        kv_blocks: of the cache of each engine; None for what fits beside the weights.
        max_items: items that an encoder takes at once.
        late_kv_only: a SwiftKV prefill instance without the layers after the cut.
        ranks: first accelerator of each engine in the cluster; empty for engines side by side.
    """

    role: Role
    count: int
    parallel: Parallel = _WHOLE
    quant: Quantization | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    kv_blocks: int | None = None
    max_items: int = 1
    late_kv_only: bool = False
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.count < 1:
            raise PlanError(f"pool {self.role}: count {self.count} has to be at least 1")
        if self.ranks and len(self.ranks) != self.count:
            raise PlanError(f"pool {self.role}: {self.count} engines and {len(self.ranks)} places")

    @property
    def gpus(self) -> int:
        """Of all its engines."""
        return self.count * self.parallel.gpus

    @property
    def name(self) -> str:
        """For example ``2 prefill tp4 pp2``."""
        cut = self.parallel
        sizes = [f"{kind}{size}" for kind, size in (("tp", cut.tp), ("pp", cut.pp), ("dp", cut.dp)) if size > 1]
        return " ".join([str(self.count), self.role, *sizes, *(["ep"] if cut.ep else [])])


@dataclass(frozen=True)
class Plan:
    """A fleet: either one pool `any`, or `prefill` and `decode`; with either also `encode`.

    Raises:
        PlanError: other roles, or several pools of one.
    """

    pools: tuple[PoolPlan, ...]

    def __post_init__(self) -> None:
        roles = [pool.role for pool in self.pools]
        if len(set(roles)) != len(roles):
            raise PlanError(
                f"two pools of one role: {', '.join(roles)}; a role has one pool of equal engines, here as in a fleet"
                " file: give that pool more engines, or plan the parts as fleets of their own"
            )
        serving = set(roles) - {"encode"}
        if serving not in ({"any"}, {"prefill", "decode"}):
            raise PlanError(f"pools {', '.join(roles) or 'none'}: needs `any`, or `prefill` and `decode`")

    def pool(self, role: Role) -> PoolPlan | None:
        """The pool of a role; None where there is none."""
        return next((pool for pool in self.pools if pool.role == role), None)

    @property
    def gpus(self) -> int:
        """Of all pools."""
        return sum(pool.gpus for pool in self.pools)

    @property
    def name(self) -> str:
        """For example ``2 prefill tp4 | 1 decode tp8``."""
        return " | ".join(pool.name for pool in self.pools)

    def placed(self) -> Plan:
        """The same with every engine's first accelerator filled in: engines side by side, pools one after another."""
        first, pools = 0, []
        for pool in self.pools:
            ranks = pool.ranks or tuple(first + index * pool.parallel.gpus for index in range(pool.count))
            pools.append(replace(pool, ranks=ranks))
            first += pool.gpus
        return Plan(tuple(pools))


@dataclass(frozen=True)
class Slo:
    """Targets of a request in seconds, and the share of requests that are to meet both. None: no target."""

    ttft: float | None = None
    tpot: float | None = None
    attainment: float = 0.9

    def met(self, ttft: float, tpot: float) -> bool:
        """Whether a request with these times meets both."""
        return (self.ttft is None or ttft <= self.ttft) and (self.tpot is None or tpot <= self.tpot)
