"""Of several controllers one acts: a Lease at an emulated API server, scripted instances and router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import kmock
import pytest
from aiohttp import web
from kube_emulator import ApiServer
from prometheus_client import CollectorRegistry

from vllm_suite.kube.client import Kube
from vllm_suite.kube.verbs import LEASES, verbs
from vllm_suite.roles import controller as controller_module
from vllm_suite.roles.client import Access
from vllm_suite.roles.config import RolesSpec
from vllm_suite.roles.controller import Controller
from vllm_suite.roles.lease import Lease

NAME = "llm-controller"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Cluster:
    def __init__(self, url: str) -> None:
        self.url = url
        self.clock = Clock()
        self.kubes: list[Kube] = []

    def lease(self, holder: str, url: str | None = None) -> Lease:
        self.kubes.append(Kube(url or self.url, "prod"))
        return Lease(self.kubes[-1], NAME, holder, 15, self.clock)

    async def spec(self) -> dict[str, Any]:
        return (await self.kubes[0].get(LEASES, NAME))["spec"]  # type: ignore[no-any-return]


@pytest.fixture
async def cluster() -> AsyncIterator[tuple[Cluster, ApiServer]]:
    async with ApiServer() as api, kmock.Server(api) as server:
        api.resources["coordination.k8s.io/v1/leases"] = {}
        made = Cluster(str(server.url))
        yield made, api
        for kube in made.kubes:
            await kube.close()


async def test_one_leads_and_another_follows_when_it_stops(cluster: tuple[Cluster, ApiServer]) -> None:
    one, api = cluster
    a, b = one.lease("a"), one.lease("b")
    assert (await a.hold(), await b.hold()) == ("leader", "follower")
    assert (a.left(), b.left()) == (15.0, float("-inf"))
    for _ in range(5):
        one.clock.now += 6
        assert (await a.hold(), await b.hold()) == ("leader", "follower")
    assert (await one.spec())["leaseTransitions"] == 0
    # It dies. Nobody leads for a duration, as far as the other one can see, and then the other does.
    one.clock.now += 14
    assert await b.hold() == "follower"
    assert 0 < a.left() < 3
    one.clock.now += 2
    assert a.left() <= 0
    assert await b.hold() == "leader"
    assert ((await one.spec())["holderIdentity"], (await one.spec())["leaseTransitions"]) == ("b", 1)
    assert await a.hold() == "follower"
    assert api.asked() <= verbs("controller")


async def test_a_record_of_its_own_name_is_waited_for(cluster: tuple[Cluster, ApiServer]) -> None:
    """The process before it in the same pod may have begun a switch just now."""
    one, _ = cluster
    assert await one.lease("a").hold() == "leader"
    again = one.lease("a")
    assert await again.hold() == "follower"
    one.clock.now += 15
    assert await again.hold() == "leader"


async def test_of_two_that_take_it_at_once_one_has_it(
    cluster: tuple[Cluster, ApiServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = cluster
    a, b, gone = one.lease("a"), one.lease("b"), one.lease("gone")
    await gone.hold()
    await a.hold()
    await b.hold()
    one.clock.now += 20
    real = a._kube.replace

    async def late(*args: Any) -> Any:
        assert await b.hold() == "leader"
        return await real(*args)

    monkeypatch.setattr(a._kube, "replace", late)
    assert await a.hold() == "follower"
    assert a.left() <= 0
    assert (await one.spec())["holderIdentity"] == "b"


async def test_what_is_released_is_free_at_once(cluster: tuple[Cluster, ApiServer]) -> None:
    one, _ = cluster
    a, b = one.lease("a"), one.lease("b")
    await a.hold()
    await a.release()
    assert a.left() <= 0
    assert await b.hold() == "leader"
    await a.release()
    assert (await one.spec())["holderIdentity"] == "b"


async def test_without_the_api_it_leads_no_longer_than_it_surely_holds(
    cluster: tuple[Cluster, ApiServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = cluster
    a = one.lease("a")
    await a.hold()
    monkeypatch.setattr(a._kube, "_url", "http://127.0.0.1:9")
    one.clock.now += 10
    assert (await a.hold(), a.left()) == ("leader", 5.0)
    one.clock.now += 5
    assert (await a.hold(), a.left()) == ("no_api", 0.0)


class Fleet:
    """Two prefill and one decode instance behind a router, with a queue at decode: the rule asks for a switch."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/suite/v1/instances", self._instances)
        app.router.add_get("/{name}/suite/v1/state", self._state)
        app.router.add_post("/{name}/suite/v1/role", self._role)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[union-attr]

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _instances(self, request: web.Request) -> web.Response:
        return web.json_response({"instances": [{"url": f"{self.url}/{name}"} for name in ("p0", "p1", "d0")]})

    async def _state(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        role, waiting = ("prefill", 0) if name[0] == "p" else ("decode", 9)
        return web.json_response(
            {"instance_id": name, "epoch": "e", "role": role, "role_epoch": 0, "phase": "serving", "ready": True,
             "can": ["prefill", "decode"], "load": {"waiting": waiting, "running": 1}}
        )  # fmt: skip

    async def _role(self, request: web.Request) -> web.Response:
        self.asked.append(await request.json())
        return web.json_response({"outcome": "begun"}, status=202)


async def test_only_the_leader_switches(cluster: tuple[Cluster, ApiServer], monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = cluster
    fleet = Fleet()
    await fleet.start()
    spec = RolesSpec.model_validate({"agree": 2, "hold": 30})
    registries = [CollectorRegistry() for _ in range(3)]
    leases = [one.lease("a"), one.lease("b"), one.lease("c", "http://127.0.0.1:9")]
    a, b, cut_off = (
        Controller(spec, Access(fleet.url), registry, lease=lease, clock=one.clock)
        for registry, lease in zip(registries, leases, strict=True)
    )

    def looks(index: int, outcome: str) -> float | None:
        return registries[index].get_sample_value("vllm_suite_roles_looks_total", {"outcome": outcome})

    try:
        async with aiohttp.ClientSession() as session:
            for _ in range(40):
                one.clock.now += 1
                for controller in (a, b, cut_off):
                    await controller.once(session)
            # A pause after it began to lead, then one switch, then a pause again.
            assert len(fleet.asked) == 1
            assert (looks(0, "ok"), looks(1, "follower"), looks(2, "no_api")) == (40, 40, 40)
            assert looks(1, "ok") == looks(2, "ok") == 0
            assert registries[0].get_sample_value("vllm_suite_roles_leader") == 1
            assert registries[1].get_sample_value("vllm_suite_roles_leader") == 0
            # It stops. The other one leads when the lease has run out, and waits before its first switch.
            ends, leads, switched = leases[0]._until, 0.0, 0.0
            while not switched:
                one.clock.now += 1
                await b.once(session)
                leads = leads or (one.clock.now if looks(1, "ok") else 0.0)
                switched = one.clock.now if len(fleet.asked) > 1 else 0.0
                assert one.clock.now < 200
            assert leads >= ends
            assert switched - leads >= 30
            # Whoever could lead before the answer to a request is there asks for nothing.
            one.clock.now += 100
            await b.once(session)
            refused = looks(1, "no_api") or 0

            def short() -> float:
                return 2.5

            monkeypatch.setattr(leases[1], "left", short)
            one.clock.now += 1
            await b.once(session)
            assert looks(1, "no_api") == refused + 1
            assert len(fleet.asked) == 2
    finally:
        await fleet.stop()


async def test_a_controller_that_ends_waits_for_no_api_server(
    cluster: tuple[Cluster, ApiServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = cluster
    lease = one.lease("a")
    await lease.hold()
    monkeypatch.setattr(controller_module, "RELEASE_S", 0.1)
    async with await asyncio.start_server(lambda reader, writer: asyncio.sleep(30), "127.0.0.1", 0) as silent:
        monkeypatch.setattr(lease._kube, "_url", f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}")
        controller = Controller(RolesSpec(), Access("http://127.0.0.1:9"), CollectorRegistry(), lease=lease)
        async with aiohttp.ClientSession() as session:
            task = asyncio.create_task(controller.run(session))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
