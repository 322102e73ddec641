"""The controller: one process that looks at the fleet, decides, and asks one instance at a time to switch.

It keeps nothing that matters: the roles are in the instances. If it dies the fleet keeps its roles, and another begins
with a look. What it remembers are roles of instances that are restarted meanwhile (`former.py`). Two of them cannot
break a switch (an instance takes one at a time, and only for the epoch that was seen), but together they may bring a
pool below its floor, so run one, or several with a Lease.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_suite.metrics import CONTROLLER as SPECS
from vllm_suite.roles.client import TIMEOUT_S, Access, NoAnswer, look, switch
from vllm_suite.roles.config import RolesSpec
from vllm_suite.roles.decider import ROLES, Decider, Move
from vllm_suite.roles.follow import Follow, Rule
from vllm_suite.roles.lease import Lease
from vllm_suite.roles.scale import Scaling, Workload
from vllm_suite.roles.seen import Seen, others_take

if TYPE_CHECKING:
    import aiohttp
    from prometheus_client import CollectorRegistry

SURE_S = TIMEOUT_S + 1.0
"""A switch is asked for only while the lease is held for longer than the request may take."""

RELEASE_S = 5.0

_log = logging.getLogger("vllm.suite.roles")


class Controller:
    """One fleet.

    Args:
        rule: that decides; EPD's where it is left out.
        dry_run: say what would be done, and do nothing.
        lease: acts only while it is held.
        scale: the workload of the instances, where `roles.scale` is set, and the GPUs of one instance.
    """

    def __init__(
        self,
        spec: RolesSpec,
        access: Access,
        registry: CollectorRegistry,
        rule: Rule | None = None,
        dry_run: bool = False,
        lease: Lease | None = None,
        scale: tuple[Workload, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec = spec
        self._access = access
        self._dry_run = dry_run
        self._lease = lease
        self._leads = lease is None
        self._workload = scale[0] if scale is not None else None
        self._scaling = Scaling(spec.scale, scale[1], spec.least_queue) if scale is not None and spec.scale else None
        self._clock = clock
        self._rule = rule or Follow()
        self._decider = Decider(spec, self._rule)
        self._series = _make(registry)
        self._start_at_zero()
        self._troubles: set[str] = set()

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Look again and again, until cancelled."""
        try:
            while True:
                await self.once(session)
                await asyncio.sleep(self._spec.every)
        finally:
            if self._lease is not None:
                try:
                    async with asyncio.timeout(RELEASE_S):
                        await self._lease.release()
                except TimeoutError:
                    _log.warning("the lease is left to run out: the API server did not answer in %g s", RELEASE_S)

    async def once(self, session: aiohttp.ClientSession) -> Move | None:
        """One look, and what was decided after it."""
        if self._lease is not None and not await self._lead(self._lease):
            return None
        try:
            fleet, troubles = await look(session, self._access)
        except NoAnswer as error:
            self._count("vllm_suite_roles_looks_total", "no_router")
            self._say({str(error)})
            return None
        self._say(set(troubles))
        self._count("vllm_suite_roles_looks_total", "partial" if troubles else "ok")
        now = self._clock()
        self._rule.see(fleet, now)
        self._decider.see(fleet, now)
        self._gauges(fleet)
        if troubles:
            # One that cannot be asked may be switching just now, or be the last of its pool.
            return None
        move = self._decider.decide(fleet, now)
        self._foreseen()
        if move is None:
            await self._scale(fleet, now)
            return None
        if self._lease is not None and self._lease.left() < SURE_S:
            # Whoever leads next has to see this switch: it has to be begun before the lease can be theirs.
            self._count("vllm_suite_roles_looks_total", "no_api")
            return None
        await self._make_move(session, move, fleet)
        return move

    async def _scale(self, fleet: list[Seen], now: float) -> None:
        spec = self._spec.scale
        if self._scaling is None or self._workload is None or spec is None:
            return
        helps = self._decider.held not in ("rule", "queue", "floor", "nobody")
        step = self._scaling.step(fleet, helps, self._rule.spare(), now)
        if not step or self._dry_run or (self._lease is not None and self._lease.left() < SURE_S):
            return
        outcome = await self._workload.add(step, len(fleet), spec.least, self._scaling.most) or "changing"
        self._series["vllm_suite_roles_scalings_total"].labels("up" if step > 0 else "down", outcome).inc()

    async def _lead(self, lease: Lease) -> bool:
        outcome = await lease.hold()
        leads = outcome == "leader" and lease.left() >= SURE_S
        self._series["vllm_suite_roles_leader"].set(leads)
        if leads and not self._leads:
            # What the one before did, and when, is not known here.
            self._decider.took_over(self._clock())
        self._leads = leads
        if not leads:
            self._count("vllm_suite_roles_looks_total", "no_api" if outcome == "leader" else outcome)
        return leads

    async def _make_move(self, session: aiohttp.ClientSession, move: Move, fleet: list[Seen]) -> None:
        what = f"{move.instance.instance_id}: {move.instance.role} to {move.target} ({move.why})"
        if self._dry_run:
            _log.info("would switch %s", what)
            outcome = "dry_run"
            self._decider.begun(move, self._clock())
        else:
            try:
                key, give_back = self._access.instance_key, others_take(fleet, move.instance)
                older = self._series["vllm_suite_roles_without_give_back_total"].inc
                answer: dict[str, Any] = await switch(session, move.instance, move.target, key, give_back, older)
            except NoAnswer as error:
                answer = {"outcome": "no_answer", "error": str(error)}
            outcome = str(answer.get("outcome"))
            if outcome not in ("begun", "noop", "refused", "no_answer"):
                outcome = "refused"
            if outcome in ("begun", "no_answer"):
                # One that gave no answer may have begun; the pause holds for it too.
                self._decider.begun(move, self._clock())
            else:
                self._decider.refused(move)
            level = logging.INFO if outcome == "begun" else logging.WARNING
            _log.log(level, "switch %s: %s %s", what, outcome, answer.get("error") or "")
        self._series["vllm_suite_roles_moves_total"].labels(move.instance.role, move.target, move.why, outcome).inc()

    def _gauges(self, fleet: list[Seen]) -> None:
        for role in (*ROLES, "any"):
            pool = [one for one in fleet if one.role == role]
            self._series["vllm_suite_roles_instances"].labels(role).set(sum(one.ready for one in pool))
            self._series["vllm_suite_roles_queue"].labels(role).set(sum(one.queue for one in pool))
        self._series["vllm_suite_roles_out"].set(sum(one.phase == "out" for one in fleet))

    def _foreseen(self) -> None:
        for name, value in self._rule.figures().items():
            self._series[f"vllm_suite_roles_{name}"].set(value)

    def _start_at_zero(self) -> None:
        # Of what appears with its first count Prometheus sees no increase.
        for spec in SPECS:
            for values in spec.from_start() if spec.kind == "counter" and spec.labels else ():
                if spec.name == "vllm_suite_roles_moves_total" and self._dry_run != (values[-1] == "dry_run"):
                    continue
                if spec.name == "vllm_suite_roles_scalings_total" and self._scaling is None:
                    continue
                self._series[spec.name].labels(*values)

    def _count(self, name: str, *labels: str) -> None:
        self._series[name].labels(*labels).inc()

    def _say(self, troubles: set[str]) -> None:
        for trouble in sorted(troubles - self._troubles):
            _log.warning("nothing is switched: %s", trouble)
        self._troubles = troubles


def _make(registry: CollectorRegistry) -> dict[str, Any]:
    from prometheus_client import Counter, Gauge

    kinds = {"counter": Counter, "gauge": Gauge}
    return {spec.name: kinds[spec.kind](spec.name, spec.help, spec.labels, registry=registry) for spec in SPECS}
