"""Addresses of a Service's ready pods from its EndpointSlices, watched at the Kubernetes API.

DNS has the same addresses later: cluster resolvers keep an answer for some seconds, and it has IPv4 only here. The
right that this needs (list and watch of EndpointSlices in one namespace) is in `vllm_suite.kube.verbs`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from vllm_suite.kube.client import Kube, KubeError
from vllm_suite.kube.verbs import SLICES
from vllm_suite.router.config import ServiceTarget
from vllm_suite.router.discovery import DiscoveryError, Target

_PAUSES_S = (0.5, 1.0, 2.0, 5.0)


class SliceDiscovery:
    """One Service. `targets` lists at first, then returns when something has changed.

    Args:
        watch_s: the server ends a watch after so long, and the next begins where it ended.
        resync_s: after so long everything is listed again, whatever the watch said.
    """

    def __init__(self, kube: Kube, target: ServiceTarget, watch_s: int = 60, resync_s: float = 300.0) -> None:
        self.interval_s: float | None = 0.0
        self._kube = kube
        self._target = target
        self._watch_s = watch_s
        self._resync_s = resync_s
        self._selector = f"kubernetes.io/service-name={target.service}"
        self._slices: dict[str, frozenset[Target]] = {}
        self._version: str | None = None
        self._listed = 0.0
        self._failures = 0

    async def targets(self) -> frozenset[Target]:
        """All addresses now, waiting for a change after the first time. Raises DiscoveryError."""
        try:
            found = await self._list() if self._version is None else await self._changed()
        except KubeError as error:
            # After 410 or a broken stream nobody knows what was missed; the next call lists.
            self._version = None
            self.interval_s = _PAUSES_S[min(self._failures, len(_PAUSES_S) - 1)]
            self._failures += 1
            raise DiscoveryError(f"{self._target.service}: {error}") from error
        self._failures, self.interval_s = 0, 0.0
        return found

    async def close(self) -> None:
        """Drop the connections to the API server."""
        await self._kube.close()

    async def _list(self) -> frozenset[Target]:
        answer = await self._kube.list(SLICES, self._selector)
        version = answer.get("metadata", {}).get("resourceVersion")
        if not isinstance(version, str) or not isinstance(answer.get("items"), list):
            raise KubeError(0, "a list without items or resourceVersion")
        self._slices = {_name(one): self._addresses(one) for one in answer["items"]}
        self._version, self._listed = version, asyncio.get_running_loop().time()
        return self._all()

    async def _changed(self) -> frozenset[Target]:
        before = self._all()
        while True:
            if asyncio.get_running_loop().time() - self._listed > self._resync_s:
                return await self._list()
            assert self._version is not None
            began = asyncio.get_running_loop().time()
            async for kind, found in self._kube.watch(SLICES, self._selector, self._version, self._watch_s):
                self._version = found.get("metadata", {}).get("resourceVersion", self._version)
                if kind == "DELETED":
                    self._slices.pop(_name(found), None)
                elif kind != "BOOKMARK":
                    self._slices[_name(found)] = self._addresses(found)
                if (now := self._all()) != before:
                    return now
            # A server that ends watches at once is not asked in a circle.
            await asyncio.sleep(max(0.0, began + 1.0 - asyncio.get_running_loop().time()))

    def _all(self) -> frozenset[Target]:
        return frozenset[Target]().union(*self._slices.values())

    def _addresses(self, one: dict[str, Any]) -> frozenset[Target]:
        kind = one.get("addressType")
        if kind not in ("IPv4", "IPv6"):
            return frozenset()
        target, found = self._target, set()
        for endpoint in one.get("endpoints") or ():
            conditions = endpoint.get("conditions") or {}
            # An unset `ready` means yes; a pod that leaves is not ready.
            if conditions.get("ready") is not False and conditions.get("terminating") is not True:
                for address in endpoint.get("addresses") or ():
                    host = f"[{address}]" if kind == "IPv6" else address
                    found.add(Target(f"{target.scheme}://{host}:{target.port}", target.role))
        return frozenset(found)


def _name(found: dict[str, Any]) -> str:
    return str(found.get("metadata", {}).get("name"))
