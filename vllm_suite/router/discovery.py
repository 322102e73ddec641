"""Where instances may be: addresses only. Who is there, and whether it is ready, `membership` asks itself."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

from vllm_suite.router.config import DnsTarget, Membership, Role, StaticTarget

_FILE_S = 0.25


class Target(NamedTuple):
    """An address to ask and the role to assume where the answer says `any`."""

    url: str
    role: Role


class DiscoveryError(Exception):
    """The source could not be asked this time; the last answer stays in force."""


class Discovery(Protocol):
    """A source of addresses.

    `Membership` calls `targets` once at start and then every `interval_s` seconds (never again where that is
    None) and begins or ends the polling of addresses that came or went. `slices` waits in `targets` for a change.
    """

    interval_s: float | None

    async def targets(self) -> frozenset[Target]:
        """All addresses now. Raises `DiscoveryError`."""
        ...

    async def close(self) -> None:
        """Give back what it holds."""
        ...


class StaticDiscovery:
    """The addresses of the settings, without those that a file withdraws for now: one a line, none without the file."""

    def __init__(self, targets: Iterable[StaticTarget], withdrawn: Path | None = None) -> None:
        self.interval_s: float | None = None if withdrawn is None else _FILE_S
        self._targets = frozenset(Target(target.url, target.role) for target in targets)
        self._withdrawn = withdrawn

    async def targets(self) -> frozenset[Target]:
        out = self._out()
        return frozenset(target for target in self._targets if target.url not in out)

    async def close(self) -> None:
        pass

    def _out(self) -> set[str]:
        if self._withdrawn is None:
            return set()
        try:
            return set(self._withdrawn.read_text(encoding="utf-8").split())
        except FileNotFoundError:
            return set()
        except (OSError, UnicodeDecodeError) as exc:
            raise DiscoveryError(f"{self._withdrawn}: {exc}") from exc


class DnsDiscovery:
    """The A records of one name, resolved again and again."""

    def __init__(self, target: DnsTarget, interval_s: float) -> None:
        self.interval_s: float | None = interval_s
        self._target = target
        self._timeout_s = max(interval_s, 1.0)

    async def targets(self) -> frozenset[Target]:
        target = self._target
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await asyncio.get_running_loop().getaddrinfo(
                    target.host, target.port, family=socket.AF_INET, type=socket.SOCK_STREAM
                )
        except socket.gaierror as exc:
            if exc.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)):
                return frozenset()
            raise DiscoveryError(f"{target.host}: {exc.strerror}") from exc
        except (OSError, UnicodeError) as exc:  # TimeoutError among them; UnicodeError: no name of a host
            raise DiscoveryError(f"{target.host}: {exc or 'timed out'}") from exc
        return frozenset(Target(f"{target.scheme}://{address[4][0]}:{target.port}", target.role) for address in found)

    async def close(self) -> None:
        pass


def discoveries(settings: Membership) -> list[Discovery]:
    """The sources that the settings name. Raises kube.client.NotInCluster."""
    static = StaticDiscovery(settings.static, settings.withdrawn_file)
    found: list[Discovery] = [static] if settings.static else []
    found += [DnsDiscovery(target, settings.dns_interval_s) for target in settings.dns]
    if settings.kubernetes:
        from vllm_suite.kube.client import Kube
        from vllm_suite.router.slices import SliceDiscovery

        found += [SliceDiscovery(Kube.in_cluster(), target) for target in settings.kubernetes]
    return found
