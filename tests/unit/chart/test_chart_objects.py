"""Every object of every case is what Kubernetes accepts, and says what it should."""

from __future__ import annotations

import base64
import re
from typing import Any

import crd_schemas
import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml
from chart_objects import validate
from chart_render import CASES, CHART, FOREIGN, container, files, find, fleet, render

OTHERS = ("1.29", "1.32", "1.37")


# Every case on one version, and the two richest on all: a version's schemas take a second to load.
@pytest.mark.parametrize(
    ("name", "version"), [(name, "1.34") for name in CASES] + [(n, v) for n in ("encoders", "scaled") for v in OTHERS]
)
def test_objects_are_valid(name: str, version: str) -> None:
    for found in render(CASES[name], f"v{version}.0"):
        validate(found, version)


def test_the_validator_does_catch_a_wrong_key() -> None:
    found = find(render(CASES["plain"]), "Deployment", "llm-decode")
    container(found)["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(found, "1.34", strict=True)


def test_every_custom_resource_was_checked() -> None:
    kinds = {(found["apiVersion"], found["kind"]) for name in CASES for found in render(CASES[name])}
    assert {one for one in kinds if one[0] in FOREIGN} == set(crd_schemas.SCHEMAS)
    wrong = find(render(CASES["scaled"]), "InferencePool", "llm-router")
    wrong["spec"]["targetPort"] = 1
    with pytest.raises(jsonschema.ValidationError):
        crd_schemas.validate(wrong)


@pytest.mark.parametrize("name", CASES)
def test_strict_lint(name: str) -> None:
    result = helm_python.lint(str(CHART), CASES[name], strict=True, kube_version="v1.34.0")
    assert not result.get("errors"), result


def workloads(name: str) -> list[dict[str, Any]]:
    """Pod templates of a case, the test's pod among them."""
    pods = []
    for found in render(CASES[name]):
        if found["kind"] == "Deployment":
            pods.append(found["spec"]["template"])
        elif found["kind"] == "LeaderWorkerSet":
            template = found["spec"]["leaderWorkerTemplate"]
            pods += [template["leaderTemplate"], template["workerTemplate"]]
        elif found["kind"] == "Pod":
            pods.append(found)
    return pods


@pytest.mark.parametrize("name", CASES)
def test_every_pod_is_confined(name: str) -> None:
    pods = workloads(name)
    assert len(pods) > 2
    for pod in pods:
        spec = pod["spec"]
        component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        talks = name == "switching" and component in ("router", "controller")
        assert spec["automountServiceAccountToken"] is talks
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for one in spec["containers"]:
            security = one["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"]["drop"] == ["ALL"]
            assert security["capabilities"].get("add", []) == (
                ["IPC_LOCK"] if name == "large" and one["name"] == "vllm" else []
            )


@pytest.mark.parametrize("name", CASES)
def test_no_pod_can_fill_its_node(name: str) -> None:
    """Every emptyDir has a limit, and /dev/shm alone is memory, which the pod's memory limit counts."""
    limits: dict[str, set[str]] = {}
    for pod in workloads(name):
        for volume in pod["spec"].get("volumes", []):
            if "emptyDir" in volume:
                limits.setdefault(volume["name"], set()).add(volume["emptyDir"]["sizeLimit"])
                assert volume["emptyDir"].get("medium", "") == ("Memory" if volume["name"] == "shm" else "")
    assert limits == {"tmp": {"8Gi"}, "cache": {"100Gi"}, "shm": {"16Gi"}}


def test_room_on_disk_is_what_the_file_says() -> None:
    room = {"requests": {"ephemeral-storage": "120Gi"}, "limits": {"ephemeral-storage": "130Gi"}}
    values = fleet(
        pools={"any": {"replicas": 2}},
        roles={"control": True},
        kubernetes={"tmp_size": "3Gi", "model": {"cache_size": "300Gi"}, "instances": {"resources": room}},
    )
    objects = render(values)
    for component in ("any", "router", "controller"):
        found = find(objects, "Deployment", f"llm-{component}")
        sizes = {one["name"]: one.get("emptyDir") for one in found["spec"]["template"]["spec"]["volumes"]}
        assert sizes["tmp"] == {"sizeLimit": "3Gi"}
        assert ("cache" in sizes) is (component == "any")
        own = container(found)["resources"]
        assert (own["requests"].get("ephemeral-storage") == "120Gi") is (component == "any")
        assert (own["limits"].get("ephemeral-storage") == "130Gi") is (component == "any")
        validate(found, "1.34")


@pytest.mark.parametrize("name", CASES)
def test_selectors_find_their_pods(name: str) -> None:
    labels = [pod["metadata"]["labels"] for pod in workloads(name)]
    for found in render(CASES[name]):
        if found["kind"] == "Service":
            wanted = found["spec"]["selector"]
        elif found["kind"] in ("PodDisruptionBudget", "Deployment"):
            wanted = found["spec"]["selector"]["matchLabels"]
        else:
            continue
        hits = [one for one in labels if wanted.items() <= one.items()]
        workers = name == "large" and found["metadata"]["name"] == "llm-prefill"
        assert len(hits) == (2 if workers and found["kind"] == "PodDisruptionBudget" else 1), found


def test_probes_and_drain() -> None:
    found = find(render(CASES["encoders"]), "Deployment", "llm-prefill")
    one, spec = container(found), found["spec"]["template"]["spec"]
    assert one["readinessProbe"]["exec"]["command"][3:] == [
        "ready", "--url=http://127.0.0.1:8000", "--role=prefill", "--connector=SuiteNixlConnector",
    ]  # fmt: skip
    assert one["startupProbe"]["failureThreshold"] * one["startupProbe"]["periodSeconds"] == 1800
    assert one["lifecycle"]["preStop"]["exec"]["command"][3:] == [
        "drain", "--url=http://127.0.0.1:8000", "--settle=10", "--finish=300",
    ]  # fmt: skip
    assert spec["terminationGracePeriodSeconds"] == 10 + 300 + 30
    encode = container(find(render(CASES["encoders"]), "Deployment", "llm-encode"))
    assert not any("--connector" in word for word in encode["readinessProbe"]["exec"]["command"])
    other = fleet(engine={"kv_transfer_config": {"kv_connector": "NixlConnector"}})
    command = container(find(render(other), "Deployment", "llm-decode"))["readinessProbe"]["exec"]["command"]
    assert command[-1] == "--connector=NixlConnector"
    assert {port["containerPort"] for port in encode["ports"]} == {8000, 15600, 16600}
    plain = container(find(render(CASES["no plugin"]), "Deployment", "llm-decode"))
    assert plain["readinessProbe"]["httpGet"]["path"] == "/health"


def test_every_hook_is_a_verb_of_the_pod_tool(capsys: pytest.CaptureFixture[str]) -> None:
    from vllm_suite.fleet.pod.command import parser

    seen = set()
    for name in CASES:
        for template in workloads(name):
            for one in template["spec"]["containers"]:
                commands = [[*one["command"], *one.get("args", [])]]
                commands.append(one.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", []))
                commands.append(one.get("readinessProbe", {}).get("exec", {}).get("command", []))
                for command in commands:
                    if "vllm_suite.fleet.pod" in command:
                        args = parser().parse_args(command[3:])
                        seen.add(args.verb)
    assert seen == {"ready", "router-ready", "drain", "outlive", "check"}


def test_an_instance_over_two_nodes() -> None:
    objects = render(CASES["large"])
    spec = find(objects, "LeaderWorkerSet", "llm-prefill")["spec"]
    assert spec["leaderWorkerTemplate"]["size"] == 2
    leader, worker = (
        spec["leaderWorkerTemplate"][which]["spec"]["containers"][0] for which in ("leaderTemplate", "workerTemplate")
    )
    nodes = ["--nnodes", "2", "--node-rank", "$(LWS_WORKER_INDEX)", "--master-addr", "$(LWS_LEADER_ADDRESS)"]
    assert leader["args"][-6:] == nodes
    assert worker["args"][-7:] == [*nodes, "--headless"]
    assert leader["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert leader["resources"]["limits"]["rdma/ib"] == "1"
    assert "readinessProbe" in leader
    assert not {"readinessProbe", "startupProbe", "livenessProbe", "ports"} & set(worker)
    assert not [one for one in objects if one["kind"] == "Deployment" and one["metadata"]["name"] == "llm-prefill"]


def test_devices_and_overrides_of_a_role() -> None:
    found = find(render(CASES["large"]), "Deployment", "llm-decode")
    one, spec = container(found), found["spec"]["template"]["spec"]
    assert one["resources"] == {
        "requests": {"cpu": "16"},
        "limits": {"nvidia.com/gpu": "8", "rdma/ib": "1"},
    }
    assert spec["nodeSelector"] == {"gpu": "h200"}
    assert spec["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert spec["imagePullSecrets"] == [{"name": "pull"}]
    assert one["image"] == "vllm-suite@sha256:" + "0" * 64
    assert [port["containerPort"] for port in one["ports"]] == [8000, 15600, 15601, 15602, 15603]
    term = spec["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0]
    assert term["topologyKey"] == "topology.kubernetes.io/zone"
    cpu = container(find(render(CASES["cpu"]), "Deployment", "llm-decode"))
    assert "limits" not in cpu["resources"] or not cpu["resources"]["limits"]


def test_only_peers_and_the_router_reach_an_instance() -> None:
    spec = find(render(CASES["encoders"]), "NetworkPolicy", "llm-instances")["spec"]
    peers, router, others = spec["ingress"]
    assert "ports" not in peers
    assert peers["from"][0]["podSelector"] == spec["podSelector"]
    assert router["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "router"
    assert [port["port"] for port in router["ports"]] == [8000, 16600]
    assert [port["port"] for port in others["ports"]] == [8000]
    assert len(others["from"]) == 1
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert len(find(render(CASES["scaled"]), "NetworkPolicy", "llm-instances")["spec"]["ingress"][2]["from"]) == 2


def test_egress_of_the_router_is_closed_unless_it_fetches() -> None:
    assert find(render(CASES["plain"]), "NetworkPolicy", "llm-router")["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert find(render(CASES["encoders"]), "NetworkPolicy", "llm-router")["spec"]["policyTypes"] == ["Ingress"]


def test_a_model_from_a_volume_needs_no_hub() -> None:
    ports = [
        port["port"]
        for rule in find(render(CASES["cpu"]), "NetworkPolicy", "llm-instances")["spec"]["egress"]
        for port in rule.get("ports", [])
    ]
    assert 443 not in ports
    spec = find(render(CASES["cpu"]), "Deployment", "llm-decode")["spec"]["template"]["spec"]
    assert {"name": "model", "persistentVolumeClaim": {"claimName": "weights", "readOnly": True}} in spec["volumes"]
    mounts = {mount["mountPath"]: mount for mount in spec["containers"][0]["volumeMounts"]}
    assert mounts["/models"]["readOnly"] is True


def test_keys_are_made_and_differ() -> None:
    data = find(render(CASES["plain"]), "Secret", "llm-keys")["data"]
    keys = {name: base64.b64decode(text) for name, text in data.items()}
    assert set(keys) == {"upstream-key", "control-key", "fleet-key"}
    assert len(set(keys.values())) == 3
    assert all(len(key) == 40 for key in keys.values())
    named = fleet(kubernetes={"keys": {"existing_secret": "mine", "require_api_key": True}})
    assert not [one for one in render(named) if one["kind"] == "Secret"]
    router = container(find(render(named), "Deployment", "llm-router"))
    sources = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in router["env"] if "valueFrom" in one}
    assert sources["VLLM_SUITE_API_KEY"] == {"name": "mine", "key": "api-key"}
    assert len(sources) == 4


def test_clients_have_keys_of_their_own() -> None:
    """Listed in a Secret that the chart only names; the fleet's own questions go with a key that it draws."""
    objects = render(fleet(kubernetes={"keys": {"client_secret": "clients", "client_secret_key": "list.txt"}}))
    router = find(objects, "Deployment", "llm-router")["spec"]["template"]["spec"]
    (volume,) = [one for one in router["volumes"] if one["name"] == "api-keys"]
    assert volume["secret"]["secretName"] == "clients"
    assert volume["secret"]["items"] == [{"key": "list.txt", "path": "keys"}]
    (mount,) = [one for one in router["containers"][0]["volumeMounts"] if one["name"] == "api-keys"]
    config = yaml.safe_load(find(objects, "ConfigMap", "llm-router")["data"]["router.yaml"])
    assert config["auth"] == {"api_key_file": mount["mountPath"] + "/keys"}
    assert mount["readOnly"] is True
    assert len(base64.b64decode(find(objects, "Secret", "llm-keys")["data"]["api-key"])) == 40
    sent = {"name": "llm-keys", "key": "api-key"}
    for one in (router["containers"][0], find(objects, "Pod", "llm-test")["spec"]["containers"][0]):
        (entry,) = [entry for entry in one["env"] if entry["name"] == "VLLM_SUITE_API_KEY"]
        assert entry["valueFrom"]["secretKeyRef"] == sent
    monitor = find(objects, "PodMonitor", "llm-router")["spec"]["podMetricsEndpoints"][0]
    assert monitor["authorization"]["credentials"] == sent
    # With a Secret for the fleet too, both are only named.
    keys = {"existing_secret": "mine", "require_api_key": True, "client_secret": "clients"}
    objects = render(fleet(kubernetes={"keys": keys}))
    assert not [one for one in objects if one["kind"] == "Secret"]
    router = container(find(objects, "Deployment", "llm-router"))
    (entry,) = [entry for entry in router["env"] if entry["name"] == "VLLM_SUITE_API_KEY"]
    assert entry["valueFrom"]["secretKeyRef"] == {"name": "mine", "key": "api-key"}


def test_monitors_only_where_the_operator_is() -> None:
    kinds = {found["kind"] for found in render(CASES["scaled"], apis=())}
    assert not kinds & {"PodMonitor", "PrometheusRule"}
    monitor = find(render(CASES["scaled"]), "PodMonitor", "llm-router")["spec"]["podMetricsEndpoints"][0]
    assert monitor["authorization"]["credentials"] == {"name": "llm-keys", "key": "api-key"}
    plain = find(render(CASES["plain"]), "PodMonitor", "llm-router")["spec"]["podMetricsEndpoints"][0]
    assert "authorization" not in plain


def test_pools_scale_by_tokens() -> None:
    objects = render(CASES["scaled"])
    hpa = find(objects, "HorizontalPodAutoscaler", "llm-decode")["spec"]
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (2, 4)
    assert hpa["metrics"][0]["external"]["target"] == {"type": "AverageValue", "averageValue": "9000"}
    keda = find(objects, "ScaledObject", "llm-prefill")["spec"]
    assert keda["scaleTargetRef"]["kind"] == "Deployment"
    assert keda["triggers"][0]["metadata"]["threshold"] == "40000"
    assert 'vllm_suite_router_outstanding_tokens{role="prefill"' in keda["triggers"][0]["metadata"]["query"]
    for role in ("prefill", "decode"):
        # A Deployment with replicas would set the autoscaler back at every upgrade.
        assert "replicas" not in find(objects, "Deployment", f"llm-{role}")["spec"]


def test_a_route_leads_clients_to_v1_alone() -> None:
    spec = find(render(CASES["switching"]), "HTTPRoute", "llm-router")["spec"]
    assert spec["parentRefs"] == [{"name": "public", "namespace": "edge", "sectionName": "https"}]
    assert spec["hostnames"] == ["llm.example.com"]
    (rule,) = spec["rules"]
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/v1"}}]
    assert rule["timeouts"] == {"request": "3600s", "backendRequest": "3600s"}
    assert rule["backendRefs"] == [{"name": "llm-router", "port": 80}]
    assert not [one for one in render(CASES["plain"]) if one["kind"] in ("HTTPRoute", "InferencePool")]


def test_a_picker_chooses_among_routers() -> None:
    objects = render(CASES["scaled"])
    (rule,) = find(objects, "HTTPRoute", "llm-router")["spec"]["rules"]
    pool = {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "llm-router"}
    assert rule["backendRefs"] == [pool]
    assert rule["timeouts"]["request"] == "900s"
    spec = find(objects, "InferencePool", "llm-router")["spec"]
    router = find(objects, "Deployment", "llm-router")["spec"]["template"]
    assert spec["selector"]["matchLabels"].items() <= router["metadata"]["labels"].items()
    assert spec["targetPorts"] == [{"number": router["spec"]["containers"][0]["ports"][0]["containerPort"]}]
    assert spec["endpointPickerRef"] == {"name": "picker", "port": {"number": 9002}, "failureMode": "FailOpen"}


def test_the_helm_test_asks_for_what_the_fleet_can_do() -> None:
    pod = find(render(CASES["encoders"]), "Pod", "llm-test")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert "--decode=http://llm-decode:8000" in pod["spec"]["containers"][0]["args"]
    # One pool, of which the controller makes prefill and decode instances.
    roles = fleet(pools={"any": {"replicas": 2}}, roles={"control": True, "start": {"prefill": 1, "decode": 1}})
    switched = find(render(roles), "Pod", "llm-test")["spec"]["containers"][0]["args"]
    assert "--decode=http://llm-any:8000" in switched
    alone = find(render(CASES["any"]), "Pod", "llm-test")["spec"]["containers"][0]["args"]
    assert not any("--decode" in word for word in alone)


def test_a_changed_router_file_makes_new_pods() -> None:
    sums = set()
    for tokens in (100, 200):
        values = fleet(router={"disaggregation": {"min_prompt_tokens": tokens}})
        template = find(render(values), "Deployment", "llm-router")["spec"]["template"]
        sums.add(template["metadata"]["annotations"]["checksum/config"])
    assert len(sums) == 2


def test_a_new_chart_version_alone_restarts_no_instance() -> None:
    for pod in workloads("plain"):
        if pod.get("kind") != "Pod":
            assert "helm.sh/chart" not in pod["metadata"]["labels"]


def test_notes_name_the_key_only_where_there_is_one() -> None:
    def notes(name: str) -> str:
        return next(text for path, text in files(CASES[name]).items() if path.endswith("NOTES.txt"))

    assert "Bearer" in notes("scaled")
    assert "Bearer" not in notes("plain")
    assert "need no key" in notes("plain")
    for kind in ("Service", "Secret"):
        for name in ("plain", "scaled"):
            made = {found["metadata"]["name"] for found in render(CASES[name]) if found["kind"] == kind}
            said = re.findall(r"service/(\S+)" if kind == "Service" else r"get secret (\S+)", notes(name))
            assert made.issuperset(said), "named in the notes, and not there"
            assert said or (kind, name) == ("Secret", "plain")
    # What nobody asked for is not missed.
    quiet = files(fleet(kubernetes={"monitoring": {"enabled": False}}), apis=())
    assert "operator" in next(text for path, text in files(fleet(), apis=()).items() if path.endswith("NOTES.txt"))
    assert "operator" not in next(text for path, text in quiet.items() if path.endswith("NOTES.txt"))
    # Nobody may scrape instances unless the file says who.
    assert "network_policies.metrics_from" in notes("plain")
    assert "network_policies.metrics_from" not in notes("switching")
