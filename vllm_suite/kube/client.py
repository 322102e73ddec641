"""The Kubernetes API as a pod sees it: get, list, watch, create, replace and patch of objects in one namespace.

Over aiohttp, which the suite has anyway: the container holds the wheel and what that needs, so a client library with
the models of every kind would be installed for six calls. Every call has a deadline.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_suite.kube.verbs import Resource

if TYPE_CHECKING:
    import aiohttp

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_TIMEOUT_S = 10.0
_MAX_BYTES = 16 << 20


class KubeError(RuntimeError):
    """The API server refused, or gave no answer. `status` is its HTTP status, 0 where there was none."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class NotInCluster(RuntimeError):
    """This process is in no pod that may talk to the API server; the text says what is missing."""


class Kube:
    """One API server and one namespace. Close it when done."""

    def __init__(
        self, url: str, namespace: str, token_file: Path | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self.namespace = namespace
        self._url = url.rstrip("/")
        self._token_file = token_file
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def in_cluster(cls, environ: Mapping[str, str] = os.environ, folder: Path = SERVICE_ACCOUNT) -> Kube:
        """From what every pod with a service-account token has. Raises NotInCluster."""
        host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise NotInCluster("KUBERNETES_SERVICE_HOST is not set: this is no pod of a Kubernetes cluster")
        try:
            (folder / "token").read_text(encoding="utf-8")
            namespace = (folder / "namespace").read_text(encoding="utf-8").strip()
            tls = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        except OSError as error:
            raise NotInCluster(f"the pod has no token ({error}): automountServiceAccountToken") from None
        host = f"[{host}]" if ":" in host else host
        return cls(f"https://{host}:{port}", namespace, folder / "token", tls)

    async def close(self) -> None:
        """Drop connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def get(self, resource: Resource, name: str) -> dict[str, Any]:
        """One object. Raises KubeError, with status 404 where there is none."""
        return await self._call("GET", self._path(resource, name))

    async def list(self, resource: Resource, selector: str) -> dict[str, Any]:
        """The list object of those whose labels match: `items`, and the resourceVersion to watch from."""
        return await self._call("GET", self._path(resource), params={"labelSelector": selector})

    async def create(self, resource: Resource, body: dict[str, Any]) -> dict[str, Any]:
        """Status 409 where it is there already."""
        return await self._call("POST", self._path(resource), body)

    async def replace(self, resource: Resource, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """The verb `update`. Status 409 where the resourceVersion in `body` is not the current one."""
        return await self._call("PUT", self._path(resource, name), body)

    async def patch(self, resource: Resource, name: str, body: dict[str, Any], sub: str = "") -> dict[str, Any]:
        """A merge patch of the object or of its subresource."""
        path = self._path(resource, name) + (f"/{sub}" if sub else "")
        return await self._call("PATCH", path, body, content="application/merge-patch+json")

    async def watch(
        self, resource: Resource, selector: str, version: str, seconds: int
    ) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """Changes since `version` as (ADDED, MODIFIED, DELETED or BOOKMARK, object); ends after `seconds`.

        Raises KubeError, with status 410 where the server has forgotten what came after `version`: list again.
        """
        import aiohttp
        import msgspec

        params = {
            "watch": "true",
            "labelSelector": selector,
            "resourceVersion": version,
            "timeoutSeconds": str(seconds),
            "allowWatchBookmarks": "true",
        }
        timeout = aiohttp.ClientTimeout(total=seconds + _TIMEOUT_S, connect=_TIMEOUT_S)
        try:
            async with self._open().get(
                self._url + self._path(resource),
                params=params,
                headers=self._headers(),
                timeout=timeout,
                ssl=self._tls or True,
                allow_redirects=False,
            ) as response:
                if response.status != 200:
                    raise KubeError(response.status, f"watch of {resource.plural}: HTTP {response.status}")
                rest = b""
                async for piece in response.content.iter_any():
                    *lines, rest = (rest + piece).split(b"\n")
                    if len(rest) > _MAX_BYTES:
                        raise KubeError(0, f"watch of {resource.plural}: an event above {_MAX_BYTES} bytes")
                    for line in lines:
                        if line.strip():
                            yield _event(line, resource)
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError among them
            raise KubeError(0, f"watch of {resource.plural}: {error or type(error).__name__}") from error
        except msgspec.DecodeError as error:
            raise KubeError(0, f"watch of {resource.plural}: {error}") from error

    def _path(self, resource: Resource, name: str = "") -> str:
        root = f"/apis/{resource.group}" if resource.group else "/api"
        return f"{root}/{resource.version}/namespaces/{self.namespace}/{resource.plural}" + (f"/{name}" if name else "")

    def _headers(self) -> dict[str, str]:
        # Read each time: the kubelet puts a new token there before the old one ends.
        return {"Authorization": f"Bearer {self._token_file.read_text('utf-8').strip()}"} if self._token_file else {}

    def _open(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession()
        return self._session

    async def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        params: dict[str, str] | None = None,
        content: str = "application/json",
    ) -> dict[str, Any]:
        import aiohttp
        import msgspec

        what = f"{method} {path}"
        try:
            headers = self._headers() | ({"Content-Type": content} if body is not None else {})
            async with (
                asyncio.timeout(_TIMEOUT_S),
                self._open().request(
                    method,
                    self._url + path,
                    data=None if body is None else msgspec.json.encode(body),
                    params=params,
                    headers=headers,
                    ssl=self._tls or True,
                    allow_redirects=False,
                ) as response,
            ):
                raw = b""
                async for piece in response.content.iter_any():
                    raw += piece
                    if len(raw) > _MAX_BYTES:
                        raise KubeError(0, f"{what}: answered more than {_MAX_BYTES} bytes")
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError among them
            raise KubeError(0, f"{what}: {error or type(error).__name__}") from error
        try:
            found = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            found = None
        if response.status >= 300:
            said = found.get("message") if isinstance(found, dict) else None
            raise KubeError(response.status, f"{what}: HTTP {response.status} {said or ''}".rstrip())
        if not isinstance(found, dict):
            raise KubeError(0, f"{what}: answered no JSON object")
        return found


def _event(line: bytes, resource: Resource) -> tuple[str, dict[str, Any]]:
    import msgspec

    event = msgspec.json.decode(line)
    kind, found = (event.get("type"), event.get("object")) if isinstance(event, dict) else (None, None)
    if not isinstance(kind, str) or not isinstance(found, dict):
        raise KubeError(0, f"watch of {resource.plural}: an event without type or object")
    if kind == "ERROR":
        code = found.get("code")
        raise KubeError(code if isinstance(code, int) else 0, f"watch of {resource.plural}: {found.get('message')}")
    return kind, found
