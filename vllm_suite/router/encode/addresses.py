"""Which addresses media may be fetched from: public ones, and networks that the operator named."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from aiohttp.abc import AbstractResolver, ResolveResult

from vllm_suite.router.encode.refusal import BadMedia

# Global by their registry and yet a cloud's own: Azure's host agent.
_METADATA = frozenset({ip_address("168.63.129.16")})
# Prefixes that carry an IPv4 address to whatever it names: translation (well-known, local), and old tunnels.
_EMBEDDING = tuple(ip_network(text) for text in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96"))


class Addresses:
    """The rule, with the operator's exceptions."""

    def __init__(self, allowed_networks: Iterable[str]) -> None:
        self._allowed = tuple(ip_network(text) for text in allowed_networks)

    def may(self, text: str) -> bool:
        """Whether media may be fetched from this address. Anything that is no plain address may not."""
        try:
            address = ip_address(text)
        except ValueError:
            return False
        if isinstance(address, IPv6Address):
            if address.scope_id is not None:
                return False
            if address.ipv4_mapped is not None:
                address = address.ipv4_mapped
        if any(address.version == network.version and address in network for network in self._allowed):
            return True
        return _public(address)


def _public(address: IPv4Address | IPv6Address) -> bool:
    if address in _METADATA or not address.is_global:
        return False
    if address.is_multicast or address.is_reserved or address.is_unspecified or address.is_loopback:
        return False
    return not (isinstance(address, IPv6Address) and any(address in network for network in _EMBEDDING))


class CheckedResolver(AbstractResolver):
    """Resolves a name once and hands out checked addresses only: the connection goes to what was checked.

    One address that may not be fetched from condemns the name. A name with a public and a private address is how a
    rebinding attack looks.
    """

    def __init__(self, addresses: Addresses) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Raises `BadMedia` for a name with a forbidden address, OSError for one that cannot be resolved."""
        loop = asyncio.get_running_loop()
        infos = await loop.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        found: list[ResolveResult] = []
        for kind, _, protocol, _, address in infos:
            if not self._addresses.may(str(address[0])):
                raise forbidden()
            found.append(
                ResolveResult(
                    hostname=host,
                    host=str(address[0]),
                    port=port,
                    family=kind,
                    proto=protocol,
                    flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                )
            )
        if not found:
            raise OSError("the name has no address")
        return found

    async def close(self) -> None:
        """Nothing to close."""


def forbidden() -> BadMedia:
    """The refusal. It does not say what the name resolves to: that would map a private network."""
    return BadMedia(400, "forbidden_address", "media is not fetched from this host")
