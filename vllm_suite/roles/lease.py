"""One of several controllers leads: a Kubernetes Lease, held and taken over as client-go's leader election does it.

Whoever holds it renews it; where its record has not changed for its duration by one's own clock, it is taken over. No
clock of another machine is read. A leader that cannot renew stops acting before the duration is over, counted from the
moment at which it *sent* its last renewal that was answered, so two never act at the same time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

from vllm_suite.kube.client import Kube, KubeError
from vllm_suite.kube.verbs import LEASES

_log = logging.getLogger("vllm.suite.roles")

Outcome = Literal["leader", "follower", "no_api"]

DURATION_S = 15
"""As client-go's default."""


class Lease:
    """This process's part in one Lease.

    Args:
        name: of the Lease object; made where it is missing.
        holder: this process, unique among the controllers: the pod's name.
        duration: whole seconds after which a holder that does not renew has lost it.
    """

    def __init__(
        self,
        kube: Kube,
        name: str,
        holder: str,
        duration: int = DURATION_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kube = kube
        self._name = name
        self._holder = holder
        self._duration = duration
        self._clock = clock
        self._until = float("-inf")
        self._seen: tuple[Any, ...] | None = None
        self._seen_at = float("-inf")
        self._trouble = ""
        self.outcome: Outcome = "follower"

    def left(self) -> float:
        """Seconds for which it is surely held from now on; not above 0 where it is not."""
        return self._until - self._clock()

    async def hold(self) -> Outcome:
        """Take or renew it, if it may be. Called at every look; asks the API server a third of the duration apart."""
        if self.left() < self._duration * 2 / 3:
            before = self.outcome
            try:
                self.outcome = "leader" if await self._try() else "follower"
            except KubeError as error:
                # What is held is held until it ends; it just cannot be renewed now.
                self.outcome = "leader" if self.left() > 0 else "no_api"
                if self._trouble != str(error):
                    _log.warning("lease %s: %s", self._name, error)
                self._trouble = str(error)
            if self.outcome != before:
                _log.info("lease %s: %s is %s", self._name, self._holder, self.outcome)
        return self.outcome

    async def release(self) -> None:
        """Let another one have it at once. For the end of the process: nothing may act afterwards."""
        if self.left() <= 0:
            return
        self._until = float("-inf")
        try:
            found = await self._kube.get(LEASES, self._name)
            spec = found.get("spec") or {}
            if spec.get("holderIdentity") == self._holder:
                # As client-go does it: nobody holds it, and its duration is over in a second.
                left = {**spec, "holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _now()}
                await self._kube.replace(LEASES, self._name, {**found, "spec": left})
        except KubeError as error:
            _log.warning("lease %s is left to run out: %s", self._name, error)

    async def _try(self) -> bool:
        asked = self._clock()
        try:
            found = await self._kube.get(LEASES, self._name)
        except KubeError as error:
            if error.status != 404:
                raise
            return await self._write(asked, None, {})
        spec = found.get("spec") or {}
        if spec.get("holderIdentity") == self._holder and self.left() > 0:
            return await self._write(asked, found, spec)
        # Also where it has this process's own name: that was an earlier life of it, or time has run out meanwhile.
        record = tuple(spec.get(key) for key in ("holderIdentity", "renewTime", "leaseTransitions"))
        if record != self._seen:
            self._seen, self._seen_at = record, asked
        if spec.get("holderIdentity") and asked - self._seen_at < _seconds(spec, self._duration):
            return False
        return await self._write(asked, found, spec)

    async def _write(self, asked: float, found: dict[str, Any] | None, spec: dict[str, Any]) -> bool:
        now = _now()
        mine = spec.get("holderIdentity") == self._holder and self.left() > 0
        body: dict[str, Any] = {
            "holderIdentity": self._holder,
            "leaseDurationSeconds": self._duration,
            "renewTime": now,
            "acquireTime": spec.get("acquireTime") if mine else now,
            "leaseTransitions": int(spec.get("leaseTransitions") or 0) + (found is not None and not mine),
        }
        try:
            if found is None:
                kind = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": self._name}}
                await self._kube.create(LEASES, {**kind, "spec": body})
            else:
                await self._kube.replace(LEASES, self._name, {**found, "spec": body})
        except KubeError as error:
            if error.status != 409:
                raise
            # Somebody else was quicker.
            self._until = float("-inf")
            return False
        self._until = asked + self._duration
        return True


def _seconds(spec: dict[str, Any], least: float) -> float:
    found = spec.get("leaseDurationSeconds")
    return float(found) if isinstance(found, int) and found > 0 else least


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
