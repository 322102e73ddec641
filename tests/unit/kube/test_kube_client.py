"""The API client against an emulated API server."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import kmock
import pytest
from aiohttp import web
from kube_emulator import ApiServer

from vllm_suite.kube.client import Kube, KubeError, NotInCluster
from vllm_suite.kube.verbs import DEPLOYMENTS, LEADER_WORKER_SETS, LEASES, verbs
from vllm_suite.roles.lease import Lease
from vllm_suite.roles.scale import Target, Workload


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


async def test_replace_refuses_what_somebody_changed_meanwhile(api: tuple[ApiServer, Kube]) -> None:
    _, kube = api
    made = await kube.create(LEASES, {"metadata": {"name": "a"}, "spec": {"holderIdentity": "1"}})
    await kube.replace(LEASES, "a", {**made, "spec": {"holderIdentity": "2"}})
    with pytest.raises(KubeError) as old:
        await kube.replace(LEASES, "a", {**made, "spec": {"holderIdentity": "3"}})
    assert old.value.status == 409
    assert (await kube.get(LEASES, "a"))["spec"]["holderIdentity"] == "2"


async def test_a_controller_needs_what_the_table_gives(api: tuple[ApiServer, Kube]) -> None:
    """From the first to the last call of its life, every right is used and no other."""
    server, kube = api
    now = [0.0]
    lease = Lease(kube, "llm-controller", "one", clock=lambda: now[0])
    assert await lease.hold() == "leader"
    now[0] += 10
    assert await lease.hold() == "leader"
    await lease.release()
    for resource, kind in ((DEPLOYMENTS, "deployment"), (LEADER_WORKER_SETS, "lws")):
        there = server.objects
        there["/".join(resource), "prod", "llm-any"] = {"metadata": {"name": "llm-any"}, "spec": {"replicas": 2}}
        assert await Workload(kube, Target.parse(f"{kind}/llm-any")).add(1, 2, 1, 4) == "scaled"
        assert there["/".join(resource), "prod", "llm-any"]["spec"]["replicas"] == 3
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


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """What the kubelet puts into a pod: token, namespace, and the CA of the API server, here with its key beside it."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", "/CN=api", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "ca.crt"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    (tmp_path / "token").write_text("first\n")
    (tmp_path / "namespace").write_text("prod")
    return tmp_path


async def test_a_pod_speaks_tls_and_sends_the_token_of_now(account: Path) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"path": request.path, "sent": request.headers.get("Authorization")})

    app = web.Application()
    app.router.add_get("/{tail:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(account / "ca.crt", account / "key.pem")
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    port = runner.addresses[0][1]
    kube = Kube.in_cluster({"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(port)}, account)
    first = await kube.get(LEASES, "a")
    assert first == {"path": "/apis/coordination.k8s.io/v1/namespaces/prod/leases/a", "sent": "Bearer first"}
    (account / "token").write_text("second")
    assert (await kube.get(LEASES, "a"))["sent"] == "Bearer second"
    # A server with a certificate that the cluster's CA did not sign gets no token.
    stranger = Kube(f"https://127.0.0.1:{port}", "prod", account / "token", ssl.create_default_context())
    with pytest.raises(KubeError, match="certificate"):
        await stranger.get(LEASES, "a")
    await kube.close()
    await stranger.close()
    await runner.cleanup()
