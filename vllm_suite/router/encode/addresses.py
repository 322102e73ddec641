"""Which addresses media may be fetched from: public ones, and networks that the operator named."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from aiohttp.abc import AbstractResolver, ResolveResult

from vllm_suite.router.encode.refusal import BadMedia

# What `ipaddress` calls global in some Python versions, or what is global by its registry and yet leads inside:
# protocol assignments, shared and benchmark space, Azure's host agent; translation and tunnels, which carry an IPv4
# address to whatever it names; site-local, documentation and segment routing.
_SPECIAL = tuple(
    ip_network(text)
    for text in (
        "100.64.0.0/10",
        "168.63.129.16/32",
        "192.0.0.0/24",
        "192.88.99.0/24",
        "198.18.0.0/15",
        "::/96",
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "100::/64",
        "2001::/23",
        "2002::/16",
        "3fff::/20",
        "5f00::/16",
        "fec0::/10",
    )
)


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
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    return not any(address.version == network.version and address in network for network in _SPECIAL)


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
