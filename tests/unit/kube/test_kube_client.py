"""The API client against an emulated API server, with lightkube as the other party that changes things."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import kmock
import pytest
from kube_emulator import ApiServer

from vllm_suite.kube.client import Kube, KubeError, NotInCluster
from vllm_suite.kube.verbs import DEPLOYMENTS, LEADER_WORKER_SETS, LEASES, verbs


@pytest.fixture
async def api() -> AsyncIterator[tuple[ApiServer, Kube]]:
    async with ApiServer() as api, kmock.Server(api) as server:
        for one in (
            "coordination.k8s.io/v1/leases",
            "apps/v1/deployments",
            "leaderworkerset.x-k8s.io/v1/leaderworkersets",
        ):
            api.resources[one] = {}
        kube = Kube(str(server.url), "prod")
        yield api, kube
        await kube.close()


async def test_lease_and_scale_need_what_the_table_gives(api: tuple[ApiServer, Kube]) -> None:
    """Every verb of the controller's rights is used here, and none besides."""
    server, kube = api
    with pytest.raises(KubeError) as missing:
        await kube.get(LEASES, "llm-controller")
    assert missing.value.status == 404
    made = await kube.create(LEASES, {"metadata": {"name": "llm-controller"}, "spec": {"holderIdentity": "a"}})
    mine = {**made, "spec": {"holderIdentity": "b"}}
    assert (await kube.replace(LEASES, "llm-controller", mine))["spec"]["holderIdentity"] == "b"
    with pytest.raises(KubeError) as old:
        await kube.replace(LEASES, "llm-controller", {**made, "spec": {"holderIdentity": "c"}})
    assert old.value.status == 409
    assert (await kube.get(LEASES, "llm-controller"))["spec"]["holderIdentity"] == "b"
    for resource in (DEPLOYMENTS, LEADER_WORKER_SETS):
        named = f"{resource.group}/{resource.version}/{resource.plural}"
        server.objects[named, "prod", "llm-decode"] = {"metadata": {"name": "llm-decode"}, "spec": {"replicas": 1}}
        await kube.patch(resource, "llm-decode", {"spec": {"replicas": 3}}, sub="scale")
        assert server.objects[named, "prod", "llm-decode"]["spec"]["replicas"] == 3
    assert server.asked() == verbs("controller")


async def test_no_answer_is_an_error_in_time() -> None:
    kube = Kube("http://127.0.0.1:9", "prod")
    with pytest.raises(KubeError) as failed:
        await kube.get(LEASES, "a")
    assert failed.value.status == 0
    await kube.close()


def test_in_cluster_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(NotInCluster, match="no pod"):
        Kube.in_cluster({}, tmp_path)
    with pytest.raises(NotInCluster, match="automountServiceAccountToken"):
        Kube.in_cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, tmp_path)
