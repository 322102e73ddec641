"""An API server for tests: kmock's emulator with what controllers rely on.

Added here: resourceVersions, 409 for an update of an old one, label selectors, watches that begin after a version,
and 410 once the server has forgotten it.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from typing import Any

import attrs
from aiohttp import web
from kmock import KubernetesEmulator
from kmock._internal.k8s import (  # what kmock answers errors with
    KubernetesError,
    KubernetesObjectConflictError,
    KubernetesObjectNotFoundError,
)

Object = dict[str, Any]


@attrs.define(kw_only=True)
class ApiServer(KubernetesEmulator):
    """Run it as `async with ApiServer() as api, kmock.Server(api) as server`, with `server.url`."""

    journal: list[tuple[int, str, Any, Object]] = attrs.field(factory=list, init=False)
    news: asyncio.Condition = attrs.field(factory=asyncio.Condition, init=False)
    version: int = attrs.field(default=100, init=False)
    forgotten: int = attrs.field(default=0, init=False)
    streams: int = attrs.field(default=0, init=False)

    def forget(self) -> None:
        """Drop the history, as a server does after some minutes: watches from before get 410."""
        self.journal.clear()
        self.version += 1
        self.forgotten = self.version

    def asked(self) -> set[tuple[str, str, str]]:
        """The calls so far as (API group, resource with its subresource, RBAC verb)."""
        found = set()
        for request in self._requests:
            if request.resource is None:
                continue
            method = request.method.value.upper()
            verb = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}.get(method, "get")
            if method == "GET" and request.name is None:
                verb = "watch" if request.params.get("watch") == "true" else "list"
            sub = f"/{request.subresource}" if request.subresource else ""
            found.add((request.resource.group, request.resource.plural + sub, verb))
        return found

    async def _handle(self, request: Any) -> Any:
        if request.resource is None or request.method.value.upper() not in ("POST", "PUT", "PATCH", "DELETE"):
            return await super()._handle(request)
        method, key = request.method.value.upper(), (request.resource, request.namespace, request.name)
        stored = self._objects[key] if request.name and key in self._objects else None
        there = stored is not None and not stored.deleted
        if method == "DELETE":
            if there:
                await self._tell("DELETED", request.resource, copy.deepcopy(stored.raw))
            return await super()._handle(request)
        metadata = request.data.setdefault("metadata", {})
        if there and metadata.get("resourceVersion", _version(stored.raw)) != _version(stored.raw):
            raise KubernetesObjectConflictError()
        self.version += 1
        metadata |= {"resourceVersion": str(self.version), "namespace": request.namespace}
        if method == "PUT":  # which kmock does not know
            if not there:
                raise KubernetesObjectNotFoundError()
            stored.create(request.data)
            answer = web.json_response(request.data)
        else:
            answer = await super()._handle(request)
            stored = self._objects[request.resource, request.namespace, request.name or metadata["name"]]
        kind = "ADDED" if method == "POST" else "MODIFIED"
        await self._tell(kind, request.resource, copy.deepcopy(stored.raw), self.version)
        return answer

    async def _tell(self, kind: str, resource: Any, found: Object, version: int | None = None) -> None:
        if version is None:
            self.version = version = self.version + 1
            found["metadata"]["resourceVersion"] = str(version)
        async with self.news:
            self.journal.append((version, kind, resource, found))
            self.news.notify_all()

    async def _serve_list(self, request: Any) -> Any:
        answer = await super()._serve_list(request)
        items = [copy.deepcopy(one) for one in answer["items"] if _matches(request, one)]
        return {"kind": "List", "metadata": {"resourceVersion": str(self.version)}, "items": items}

    async def _serve_watch(self, request: Any) -> AsyncIterator[Any]:
        since = int(request.params.get("resourceVersion") or self.version)
        if since < self.forgotten:
            raise KubernetesError(410, "Expired", "too old resource version")
        yield b""
        self.streams += 1
        try:
            async with asyncio.timeout(float(request.params.get("timeoutSeconds", "60"))):
                while True:
                    async with self.news:
                        fresh = [entry for entry in self.journal if entry[0] > since]
                        if not fresh:
                            await self.news.wait()
                            continue
                    for version, kind, resource, found in fresh:
                        since = version
                        if resource == request.resource and _matches(request, found):
                            yield {"type": kind, "object": found}
        except TimeoutError:
            return
        finally:
            self.streams -= 1


def _version(found: Object) -> str:
    return str(found["metadata"].get("resourceVersion"))


def _matches(request: Any, found: Object) -> bool:
    labels = found["metadata"].get("labels", {})
    wanted = [pair.partition("=")[::2] for pair in request.params.get("labelSelector", "").split(",") if pair]
    return all(labels.get(name) == value for name, value in wanted)
