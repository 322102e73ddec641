"""Asking one address who is there: the suite's `/suite/v1/state`, or a stock vLLM's public routes."""

from __future__ import annotations

import asyncio
from typing import Any, Literal, Protocol

import aiohttp
import msgspec
from yarl import URL

from vllm_suite.router.members import ItemChannel, Pulled, State

_ROLES = ("prefill", "decode", "encode", "any")
_KINDS: tuple[Literal["kv", "ec"], ...] = ("kv", "ec")
_MAX_PEERS = 64
_MAX_BYTES = 1 << 20
_MAX_NAME = 256  # they become labels of series, and lines of the log


class Gone(Exception):
    """Nobody listens at the address: the instance that was there has ended."""


class Silent(Exception):
    """No usable answer, for a reason that may pass."""


class Probe(Protocol):
    """Called by `membership` at every poll with the time allowed in seconds."""

    async def ask(self, url: str, timeout_s: float) -> State:
        """The state of whoever answers at `url`. Raises `Gone` or `Silent`."""
        ...


class _Http:
    def __init__(self, session: aiohttp.ClientSession, authorization: str | None) -> None:
        self._session = session
        self._headers = {"Authorization": authorization} if authorization else {}

    async def get(self, url: str, path: str, timeout_s: float) -> bytes:
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.get(URL(url) / path, headers=self._headers, allow_redirects=False) as response,
            ):
                if response.status != 200:
                    raise Silent(f"/{path} answered {response.status}")
                body = await response.content.read(_MAX_BYTES)
                while not response.content.at_eof():
                    body += await response.content.read(_MAX_BYTES)
                    if len(body) > _MAX_BYTES:
                        raise Silent(f"/{path} answered more than {_MAX_BYTES} bytes")
                return body
        except TimeoutError as exc:
            raise Silent(f"/{path} did not answer in {timeout_s:.1f} s") from exc
        except aiohttp.ClientConnectorError as exc:
            if isinstance(exc.os_error, ConnectionRefusedError):
                raise Gone("connection refused") from exc
            raise Silent(str(exc)) from exc
        except (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError) as exc:
            raise Silent(f"{type(exc).__name__} on /{path}") from exc


def _object(body: bytes, what: str) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise Silent(f"{what} is not JSON") from exc
    if not isinstance(found, dict):
        raise Silent(f"{what} is not a JSON object")
    return found


def _item_channel(found: object) -> ItemChannel | None:
    """What the EPD plugin adds to the state; None where there is no such plugin, or not in words known here."""
    if not isinstance(found, dict):
        return None
    host, port, role = found.get("host"), found.get("port"), found.get("role")
    if not (isinstance(host, str) and isinstance(port, int) and isinstance(role, str)):
        return None
    slices = found.get("slices", [])
    if not isinstance(slices, list) or not all(isinstance(one, str) for one in slices):
        return None
    # A consumer serves nothing; it may say so with an empty host or port 0.
    encodes = found.get("encodes") is not False
    return ItemChannel(host, port, role, tuple(slices), encodes) if 0 <= port < 65_536 else None


def _pulled(found: object) -> tuple[Pulled, ...]:
    """Totals by peer; whatever is not in words known here is left out."""
    rows: list[Pulled] = []
    for kind in _KINDS:
        peers = found.get(kind) if isinstance(found, dict) else None
        if not isinstance(peers, dict):
            continue
        for peer, row in list(peers.items())[:_MAX_PEERS]:
            if isinstance(row, list) and len(row) == 2 and type(row[0]) in (int, float):
                rows.append(Pulled(kind, peer, row[0], row[1] if type(row[1]) in (int, float) else None))
    return tuple(rows)


class SuiteProbe:
    """Identity, epoch, role, readiness and load from the suite's endpoint plugin."""

    def __init__(self, session: aiohttp.ClientSession, authorization: str | None) -> None:
        self._http = _Http(session, authorization)

    async def ask(self, url: str, timeout_s: float) -> State:
        answer = _object(await self._http.get(url, "suite/v1/state", timeout_s), "state")
        instance_id, epoch = answer.get("instance_id"), answer.get("epoch")
        role, models = answer.get("role", "any"), answer.get("models", [])
        if not (isinstance(instance_id, str) and instance_id and isinstance(epoch, str) and epoch):
            raise Silent("state without instance_id and epoch")
        if max(len(instance_id), len(epoch)) > _MAX_NAME:
            raise Silent(f"instance_id or epoch of more than {_MAX_NAME} characters")
        if role not in _ROLES or not isinstance(models, list):
            raise Silent(f"state with unknown role {role!r} or models that are no list")
        load = answer.get("load")
        length = answer.get("max_model_len")
        role_epoch, phase, target = answer.get("role_epoch"), answer.get("phase"), answer.get("target")
        return State(
            instance_id=instance_id,
            epoch=epoch,
            role=role,
            ready=answer.get("ready") is True and answer.get("draining") is not True,
            models=tuple(model for model in models if isinstance(model, str)),
            max_model_len=length if isinstance(length, int) else None,
            load=load if isinstance(load, dict) else {},
            versions={name: answer[name] for name in ("vllm", "suite", "kv_connector", "kv") if name in answer},
            ec=_item_channel(answer.get("ec")),
            role_epoch=role_epoch if isinstance(role_epoch, int) else 0,
            phase=phase if isinstance(phase, str) else "serving",
            target=target if target in _ROLES else None,
            pulled=_pulled(answer.get("pulled")),
            prefix_caching=answer.get("prefix_caching") is not False,
        )


class StockProbe:
    """A vLLM without our endpoint plugin: `/health` and `/v1/models`.

    The identity is the address. vLLM stamps its model cards with the time of the request, so no field tells
    one incarnation from the next; `membership` starts a new epoch after every gap in the answers, and a
    restart that falls between two polls goes unseen.
    """

    def __init__(self, session: aiohttp.ClientSession, authorization: str | None) -> None:
        self._http = _Http(session, authorization)

    async def ask(self, url: str, timeout_s: float) -> State:
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        await self._http.get(url, "health", timeout_s)
        left_s = max(end - loop.time(), 0.01)
        answer = _object(await self._http.get(url, "v1/models", left_s), "model list")
        cards = answer.get("data")
        if not isinstance(cards, list):
            raise Silent("model list without data")
        models = tuple(card["id"] for card in cards if isinstance(card, dict) and isinstance(card.get("id"), str))
        return State(instance_id=url, epoch="", role="any", ready=True, models=models)
