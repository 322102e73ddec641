"""The number of instances in `pools.any`, after switching and within one GPU budget: a Kubernetes workload's scale.

Switching comes first: an instance is added only while requests wait and no switch would help, and taken away only where
the planner says that one fewer, with the best roles, still serves more than what comes. New instances have no role and
get one as any other does. Which pod goes is Kubernetes' choice; its preStop hook lets it finish.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple

from vllm_suite.kube.client import Kube, KubeError
from vllm_suite.kube.verbs import DEPLOYMENTS, LEADER_WORKER_SETS, Resource
from vllm_suite.roles.config import ScaleSpec
from vllm_suite.roles.seen import Seen

_log = logging.getLogger("vllm.suite.roles")

SPARE = 1.25
"""One instance fewer has to serve so many times what comes."""

KINDS: dict[str, Resource] = {"deployment": DEPLOYMENTS, "lws": LEADER_WORKER_SETS}

Outcome = Literal["scaled", "no_api"]


class Target(NamedTuple):
    """A workload, from ``deployment/NAME`` or ``lws/NAME``."""

    resource: Resource
    name: str

    @classmethod
    def parse(cls, text: str) -> Target:
        """Raises ValueError."""
        kind, _, name = text.partition("/")
        if kind not in KINDS or not name or "/" in name:
            raise ValueError(f"{text!r} is no workload; write {' or '.join(f'{each}/NAME' for each in KINDS)}")
        return cls(KINDS[kind], name)


class Scaling:
    """When to have one more or one fewer. `most` is the budget in instances."""

    def __init__(self, spec: ScaleSpec, gpus_of_one: int, least_queue: int) -> None:
        self._spec = spec
        self.most = spec.gpus // gpus_of_one
        self._least_queue = least_queue
        self._starved: float | None = None
        self._idle: float | None = None

    def step(self, fleet: Sequence[Seen], helps: bool, spare: bool, now: float) -> int:
        """+1, -1 or 0 after a look.

        Args:
            helps: a switch is asked for, held back for now, or under way.
            spare: one fewer would do, as far as anybody can tell.
        """
        settled = all(one.ready and one.phase == "serving" for one in fleet)
        waiting = sum(one.queue for one in fleet)
        starved = settled and not helps and waiting >= self._least_queue and len(fleet) < self.most
        idle = settled and not helps and waiting == 0 and spare and len(fleet) > self._spec.least
        self._starved = (now if self._starved is None else self._starved) if starved else None
        self._idle = (now if self._idle is None else self._idle) if idle else None
        if self._starved is not None and now - self._starved >= self._spec.up_after:
            self._starved = None
            return 1
        if self._idle is not None and now - self._idle >= self._spec.down_after:
            self._idle = None
            return -1
        return 0


class Workload:
    """The scale of one workload, set with the right `patch` alone."""

    def __init__(self, kube: Kube, target: Target) -> None:
        self._kube = kube
        self._target = target
        self._trouble = ""

    async def add(self, step: int, seen: int, least: int, most: int) -> Outcome | None:
        """One more or fewer; None where the workload's size is not that of the fleet that was seen: it is changing."""
        resource, name = self._target
        try:
            # An empty patch changes nothing and answers with what is there.
            found = await self._kube.patch(resource, name, {}, sub="scale")
            have = (found.get("spec") or {}).get("replicas")
            wanted = seen + step
            if have != seen or not least <= wanted <= most:
                return None
            await self._kube.patch(resource, name, {"spec": {"replicas": wanted}}, sub="scale")
        except KubeError as error:
            if self._trouble != str(error):
                _log.warning("scale of %s: %s", name, error)
            self._trouble = str(error)
            return "no_api"
        self._trouble = ""
        _log.info("%s has %d replicas now, %d before", name, wanted, have)
        return "scaled"
