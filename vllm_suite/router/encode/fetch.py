"""Fetching what a client names by URL, with everything in the way that keeps a client from reaching inside.

Scheme, host, port and user part of every hop are checked, then the addresses behind the host; the connection goes
to an address that was checked. Nothing of the client's request is sent along.
"""

from __future__ import annotations

import asyncio

import aiohttp
from yarl import URL

from vllm_suite.router.encode.addresses import Addresses, CheckedResolver, forbidden
from vllm_suite.router.encode.config import Fetch, Modality
from vllm_suite.router.encode.refusal import BadMedia

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_UNTYPED = frozenset({"application/octet-stream", "binary/octet-stream"})
_MAX_URL = 8192
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "vllm-suite-router"}


class Fetcher:
    """Downloads items. `close` ends it."""

    def __init__(self, settings: Fetch, item_bytes: int) -> None:
        self._settings = settings
        self._limit = item_bytes
        self._addresses = Addresses(settings.allowed_networks)
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close connections that are still open."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def get(self, url: str, modality: Modality) -> tuple[str, bytes]:
        """Media type and bytes behind `url`. Raises `BadMedia`."""
        settings = self._settings
        if not settings.enabled:
            raise BadMedia(400, "url_disabled", "media URLs are not fetched here; send a data: URL")
        try:
            async with asyncio.timeout(settings.timeout_s), self._slots:
                return await self._follow(url, modality)
        except TimeoutError as exc:  # aiohttp's connection timeout among them
            raise BadMedia(400, "fetch_timeout", "its URL did not answer in time") from exc
        except (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError) as exc:
            raise BadMedia(400, "fetch_failed", "its URL cannot be fetched") from exc

    async def _follow(self, text: str, modality: Modality) -> tuple[str, bytes]:
        url = self._checked(text)
        for _ in range(1 + self._settings.max_redirects):
            async with self._open().get(url, headers=_HEADERS, allow_redirects=False) as response:
                if response.status in _REDIRECTS:
                    location = response.headers.get("Location", "")
                    target = self._checked(str(url.join(_parse(location))))
                    if url.scheme == "https" and target.scheme != "https":
                        raise BadMedia(400, "bad_redirect", "its URL redirects from https to http")
                    url = target
                    continue
                return await self._read(response, modality)
        raise BadMedia(400, "bad_redirect", "its URL redirects too often")

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            # No connection is kept: each hop is resolved and checked by itself.
            connector = aiohttp.TCPConnector(
                resolver=CheckedResolver(self._addresses), use_dns_cache=False, force_close=True, limit=0
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._settings.connect_timeout_s),
            )
        return self._session

    def _checked(self, text: str) -> URL:
        settings = self._settings
        url = _parse(text)
        host = (url.host or "").rstrip(".").lower()
        if url.scheme not in ("http", "https") or not host:
            raise BadMedia(400, "bad_url", "its URL is neither data: nor http(s):")
        if url.user is not None or url.password is not None:
            raise BadMedia(400, "bad_url", "its URL has a user part")
        if url.port not in settings.ports:
            raise BadMedia(400, "bad_url", f"its URL has port {url.port}; allowed: {sorted(settings.ports)}")
        if settings.hosts and not any(_matches(host, allowed.lower()) for allowed in settings.hosts):
            raise forbidden()
        if _numeric(url.host or "") and not self._addresses.may(host):
            raise forbidden()
        return url  # what is behind a name, the resolver checks

    async def _read(self, response: aiohttp.ClientResponse, modality: Modality) -> tuple[str, bytes]:
        if response.status != 200:
            raise BadMedia(400, "fetch_failed", f"its URL answered {response.status}")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise BadMedia(400, "fetch_failed", "its URL answered with a compressed body")
        media_type = response.content_type
        if media_type.partition("/")[0] != modality and media_type not in _UNTYPED:
            raise BadMedia(400, "wrong_type", f"its URL answered with {media_type[:64]!r}, not {modality}/*")
        too_large = BadMedia(413, "item_too_large", f"more than {self._limit} bytes")
        if (response.content_length or 0) > self._limit:
            raise too_large
        data = bytearray()
        async for piece in response.content.iter_any():
            data += piece
            if len(data) > self._limit:
                raise too_large
        return media_type, bytes(data)


def _parse(text: str) -> URL:
    if len(text) > _MAX_URL:
        raise BadMedia(400, "bad_url", "its URL is too long")
    try:
        return URL(text)
    except ValueError as exc:
        raise BadMedia(400, "bad_url", "its URL is malformed") from exc


def _numeric(host: str) -> bool:
    """Whether the client library may take this for an address, and then resolve nothing.

    It also takes the short forms that inet_aton reads (127.1, 2130706433) for addresses; those are no addresses to
    `Addresses.may`, so they are refused.
    """
    return ":" in host or host.replace(".", "").isdigit()


def _matches(host: str, allowed: str) -> bool:
    return host.endswith(allowed) if allowed.startswith(".") else host == allowed
