"""Members from EndpointSlices at an emulated API server; lightkube is the client that changes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import kmock
import pytest
from kube_emulator import ApiServer
from lightkube import AsyncClient
from lightkube.config.kubeconfig import Cluster, KubeConfig, User
from lightkube.resources.discovery_v1 import EndpointSlice

from vllm_suite.kube.client import Kube
from vllm_suite.kube.verbs import verbs
from vllm_suite.router.config import ServiceTarget
from vllm_suite.router.discovery import DiscoveryError, Target
from vllm_suite.router.slices import SliceDiscovery

SERVICE = ServiceTarget(service="llm-decode", port=8000, role="decode")


def piece(name: str, *endpoints: dict[str, Any], service: str = "llm-decode", kind: str = "IPv4") -> EndpointSlice:
    return EndpointSlice.from_dict(
        {
            "metadata": {"name": name, "namespace": "prod", "labels": {"kubernetes.io/service-name": service}},
            "addressType": kind,
            "endpoints": list(endpoints),
            "ports": [{"name": "api", "port": 8000}],
        }
    )


def pod(address: str, **conditions: bool) -> dict[str, Any]:
    return {"addresses": [address], "conditions": conditions}


def urls(found: frozenset[Target]) -> list[str]:
    return sorted(one.url for one in found)


@pytest.fixture
async def cluster() -> AsyncIterator[tuple[ApiServer, str, AsyncClient]]:
    async with ApiServer() as api, kmock.Server(api) as server:
        api.resources["discovery.k8s.io/v1/endpointslices"] = {}
        config = KubeConfig.from_one(user=User(), cluster=Cluster(server=str(server.url)))
        other = AsyncClient(config, namespace="prod", trust_env=False)
        yield api, str(server.url), other
        await other.close()


@pytest.fixture
async def source(cluster: tuple[ApiServer, str, AsyncClient]) -> AsyncIterator[SliceDiscovery]:
    made = SliceDiscovery(Kube(cluster[1], "prod"), SERVICE)
    yield made
    await made.close()


async def change(source: SliceDiscovery) -> frozenset[Target]:
    async with asyncio.timeout(10):
        return await source.targets()


async def test_create_patch_and_delete_are_seen(
    cluster: tuple[ApiServer, str, AsyncClient], source: SliceDiscovery
) -> None:
    api, _, other = cluster
    await other.create(piece("elsewhere", pod("10.0.0.9"), service="llm-prefill"))
    assert await source.targets() == frozenset()
    waiting = asyncio.create_task(change(source))
    await other.create(piece("a", pod("10.0.0.1", ready=True), pod("10.0.0.2", ready=False), pod("10.0.0.3")))
    found = await waiting
    assert found == {Target("http://10.0.0.1:8000", "decode"), Target("http://10.0.0.3:8000", "decode")}
    # The second becomes ready; the first leaves.
    fresh = [pod("10.0.0.1", ready=False, serving=True, terminating=True), pod("10.0.0.2", ready=True), pod("10.0.0.3")]
    await other.patch(EndpointSlice, "a", {"endpoints": fresh})
    assert urls(await change(source)) == ["http://10.0.0.2:8000", "http://10.0.0.3:8000"]
    await other.create(piece("b", pod("fd00::1", ready=True), kind="IPv6"))
    assert urls(await change(source)) == ["http://10.0.0.2:8000", "http://10.0.0.3:8000", "http://[fd00::1]:8000"]
    await other.delete(EndpointSlice, "a")
    assert urls(await change(source)) == ["http://[fd00::1]:8000"]
    mine = {one for one in api.asked() if one[2] in ("list", "watch")}
    assert mine == verbs("router")


async def test_a_change_between_two_watches_is_not_lost(
    cluster: tuple[ApiServer, str, AsyncClient], source: SliceDiscovery
) -> None:
    _, _, other = cluster
    await other.create(piece("a", pod("10.0.0.1")))
    assert len(await source.targets()) == 1
    await other.delete(EndpointSlice, "a")  # nobody watches just now
    assert await change(source) == frozenset()


async def test_what_the_server_forgot_is_listed_again(
    cluster: tuple[ApiServer, str, AsyncClient], source: SliceDiscovery
) -> None:
    api, _, other = cluster
    await other.create(piece("a", pod("10.0.0.1")))
    await source.targets()
    await other.delete(EndpointSlice, "a")
    await other.create(piece("b", pod("10.0.0.2")))
    api.forget()
    with pytest.raises(DiscoveryError, match="410"):
        await change(source)
    assert source.interval_s
    assert urls(await change(source)) == ["http://10.0.0.2:8000"]
    assert source.interval_s == 0.0


async def test_it_lists_again_after_a_while(cluster: tuple[ApiServer, str, AsyncClient]) -> None:
    api, url, other = cluster
    source = SliceDiscovery(Kube(url, "prod"), SERVICE, resync_s=0.0)
    await source.targets()
    await other.create(piece("a", pod("10.0.0.1")))
    api.journal.clear()  # a watch that says nothing
    assert urls(await change(source)) == ["http://10.0.0.1:8000"]
    await source.close()


async def test_members_follow_the_slices(cluster, instance, serve, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    api, url, other = cluster
    one = await instance("decode")
    monkeypatch.setattr(Kube, "in_cluster", classmethod(lambda cls: Kube(url, "prod")))
    port = httpx2.URL(one.url).port
    target = {"service": "llm-decode", "port": port, "role": "decode"}
    router = await serve([], ready=False, membership={"kubernetes": [target]})
    await other.create(piece("a", pod("127.0.0.1", ready=False)))
    assert not router.router.pool.members
    await other.patch(EndpointSlice, "a", {"endpoints": [pod("127.0.0.1", ready=True)]})
    await router.until(lambda: len(router.router.pool.members) == 1)
    api.forget()
    await other.patch(EndpointSlice, "a", {"endpoints": [pod("127.0.0.1", ready=False, terminating=True)]})
    await router.until(lambda: not router.router.pool.members)


async def test_an_upgrade_loses_no_request(cluster, instance, serve, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """A pod that leaves goes out of the slice with requests still in it: they end there, new ones go to the new pod."""
    _, url, other = cluster
    monkeypatch.setattr(Kube, "in_cluster", classmethod(lambda cls: Kube(url, "prod")))
    pods = [await instance("decode"), await instance("decode")]
    targets = [
        {"service": f"llm-{number}", "port": httpx2.URL(one.url).port, "role": "decode"}
        for number, one in enumerate(pods)
    ]
    router = await serve([], ready=False, membership={"kubernetes": targets})
    asked = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 4}
    await other.create(piece("old", pod("127.0.0.1", ready=True), service="llm-0"))
    await router.until(lambda: len(router.router.pool.members) == 1)
    old, new = pods
    old.hold = asyncio.Event()
    running = [asyncio.create_task(router.post(asked)) for _ in range(3)]
    await router.until(lambda: len(old.seen) == 3)
    # The new pod is ready first; then the old one is told to leave, and its preStop waits for what runs.
    await other.create(piece("new", pod("127.0.0.1", ready=True), service="llm-1"))
    await router.until(lambda: len(router.router.pool.members) == 2)
    gone = [pod("127.0.0.1", ready=False, serving=True, terminating=True)]
    await other.patch(EndpointSlice, "old", {"endpoints": gone})
    await router.until(lambda: [one.instance_id for one in router.router.pool.members] == [new.instance_id])
    later = [await router.post(asked) for _ in range(3)]
    old.hold.set()
    assert [status for status, _ in [*later, *await asyncio.gather(*running)]] == [200] * 6
    assert (len(old.seen), len(new.seen)) == (3, 3)
    assert router.value("recoveries_total") == 0
