"""A calibration's constants in the planner's simulator: what served requests see beside the engine's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from vllm_suite.planner.calibrate.file import Calibration
from vllm_suite.planner.calibrate.file import Serving as Measurement
from vllm_suite.planner.hardware.collectives import BUSY
from vllm_suite.planner.hardware.device import Cluster, Link
from vllm_suite.planner.models.memory import kv_bytes
from vllm_suite.planner.plan import Plan, PoolPlan, Role
from vllm_suite.planner.simulator.fleet import simulate_plan
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.simulator.setting import Serving, Setting
from vllm_suite.planner.sources.base import LatencySource, Load
from vllm_suite.planner.sources.transfers import SETUP_S
from vllm_suite.planner.workload import Request

ROUNDS = 4
"""Simulations at most: how busy an engine is follows from how much the others slow it, and the other way round."""
CLOSE = 0.01
"""Rounds end when no pool is busier or less busy by more than this share of the time."""

_MOST_SHARED = 0.5


@dataclass(frozen=True)
class Constants:
    """See `simulator.setting.Measured`. All of it is of the machine that was calibrated."""

    calibration: Calibration

    @property
    def notes(self) -> tuple[str, ...]:
        """For reports: what is in the times, and what was not measured."""
        found, calibration = self.calibration.serving, self.calibration
        if not found:
            said = ["the calibration has no serving constants: times are of engines alone, without router, HTTP server"
                    " and hand-over; calibrate with --served colocated disaggregated"]  # fmt: skip
        else:
            kinds = " and ".join(sorted(found))
            said = [f"serving constants ({kinds}) are of the machine of the calibration, {calibration.machine};"
                    " on another one they may differ"]  # fmt: skip
            if "colocated" not in found:
                said.append("without those of a colocated fleet none are used, as the hand-over is their difference;"
                            " calibrate with --served colocated disaggregated")  # fmt: skip
            elif "disaggregated" not in found:
                said.append("no hand-over was measured: plans with a prefill pool have that of the links' data sheet;"
                            " calibrate with --served colocated disaggregated")  # fmt: skip
        if calibration.beside is not None:
            said.append(f"engines slow each other as {calibration.engines} of them did there")
        return tuple(said)

    def settled(
        self, plan: Plan, setting: Setting, requests: Callable[[], Iterable[Request]], *, close: float = CLOSE
    ) -> Setting:
        """The setting with the constants, and with engines as slow as the others make them.

        Args:
            requests: called for each simulation; the same each time.
            close: see `CLOSE`; below 0 for all `ROUNDS`.

        Raises:
            SimulationError, PlanError: the plan cannot serve the requests.
        """
        busy: dict[Role, float] = {pool.role: 0.5 for pool in plan.pools if pool.role != "encode"}
        tokens, begin, end = 0, None, 0.0
        for each in requests():
            tokens, begin, end = tokens + each.output, each.arrival if begin is None else begin, each.arrival
        load = tokens, (end - (begin or 0.0)) or 1.0
        engines = sum(pool.count for pool in plan.pools if pool.role != "encode")
        together = self.calibration.beside is not None and engines > 1
        for _ in range(ROUNDS - 1 if together else 0):
            run = simulate_plan(plan, self._at(plan, setting, busy, load, counted=False), requests(), _unseen)
            before, busy = busy, {role: share(run.pools[role].busy, run.end) for role in busy}
            if max(abs(busy[role] - before[role]) for role in busy) <= close:
                break
        return self._at(plan, setting, busy, load)

    def _at(
        self,
        plan: Plan,
        setting: Setting,
        busy: Mapping[Role, float],
        load: tuple[int, float],
        *,
        counted: bool = True,
    ) -> Setting:
        """The setting where pools are busy for these shares, and so many tokens are answered in so many seconds."""
        plain, handed = (self.calibration.serving.get(kind) for kind in ("colocated", "disaggregated"))
        prefill, decode = plan.pool("prefill"), plan.pool("decode")
        loads = {
            role: Load(neighbours=self._neighbours(plan, busy, role), counted=counted,
                       serving=None if plain is None else "colocated")
            for role in busy
        }  # fmt: skip
        if plain is not None:
            setting = replace(setting, serving=_first_token(setting.serving, plain, plain.request_s, plain.busy_s))
            if prefill is not None and decode is not None and handed is not None:
                # Router and client take their time from the cores of the engines that prefill.
                shared = min(_MOST_SHARED, handed.shared_token_s * load[0] / load[1] / prefill.count)
                loads["prefill"] = replace(loads["prefill"], prompt_s=handed.prompt_cpu_s, slowdown=1 / (1 - shared))
                loads["decode"] = replace(loads["decode"], serving="disaggregated", prompt_s=handed.answer_cpu_s)
                setting = _handed_over(setting, decode, plain, handed)
            elif decode is not None:
                loads["decode"] = replace(loads["decode"], prompt_s=0.0)
        source = setting.source

        def loaded(pool: PoolPlan) -> LatencySource:
            return source(pool).loaded(loads[pool.role])

        return replace(setting, source=loaded, measured=None)

    def _neighbours(self, plan: Plan, busy: Mapping[Role, float], role: Role) -> float:
        """Share of the time for which as many others are at work as were measured; no more than all of it."""
        if self.calibration.beside is None:
            return 0.0
        others = sum(
            busy[pool.role] * (pool.count - (pool.role == role)) for pool in plan.pools if pool.role != "encode"
        )
        return min(1.0, others / max(1, self.calibration.engines - 1))


def _first_token(serving: Serving, plain: Measurement, request_s: float, busy_s: float) -> Serving:
    return replace(serving, request_s=request_s, prompt_token_s=plain.prompt_token_s, busy_s=busy_s)


def _handed_over(setting: Setting, decode: PoolPlan, plain: Measurement, handed: Measurement) -> Setting:
    """What a hand-over adds to a request, and to each token of its prompt, is simulated: hops, pull, and a link."""
    handover_s = max(0.0, handed.request_s - plain.request_s)
    # The pull runs beside the decode engine's steps, the rest comes before it is asked.
    latency_s = min(handover_s, handed.pull_s or 0.0)
    token_s = max(1e-9, handed.prompt_token_s - plain.prompt_token_s)
    size, quant = setting.block_size, decode.quant or setting.quant
    per_token = kv_bytes(setting.model, quant, decode.parallel, size, stage=0, block=size) / size
    # What a prompt's length costs beyond the hand-over is that of one pool.
    serving = _first_token(setting.serving, plain, min(plain.request_s, handed.request_s), handed.busy_s)
    return replace(
        setting,
        cluster=_linked(setting.cluster, per_token / token_s, latency_s),
        serving=replace(serving, hop_s=max(0.0, handover_s - max(latency_s, SETUP_S))),
    )


def _linked(cluster: Cluster, bytes_per_s: float, latency_s: float) -> Cluster:
    """The accelerators with the hand-over between any two of them as it was measured.

    A link is used at a share of its rate and after some setting up, both of which are in what was measured.
    """
    link = Link(gb_s=bytes_per_s / BUSY / 1e9, latency_us=max(0.0, latency_s - SETUP_S) * 1e6)
    node = cluster.device.node.model_copy(
        update={"gpus": max(cluster.gpus, cluster.device.node.gpus), "pcie": link, "nvlink": None}
    )
    return cluster.model_copy(update={"device": cluster.device.model_copy(update={"node": node})})


def share(busy: tuple[float, ...], end: float) -> float:
    """Of the time until `end` in which an engine of a pool was in a step, from the seconds of each."""
    return sum(each / end for each in busy) / len(busy) if end else 0.0


def _unseen(served: Served) -> None:
    """Of a round nothing but how busy the engines were is of interest."""
