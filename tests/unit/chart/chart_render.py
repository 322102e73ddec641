"""Rendering the chart with Helm's own engine, for the tests of this folder."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml
from helm_python import _native

ROOT = Path(__file__).parents[3]
CHART = ROOT / "charts" / "vllm-suite"
OPERATOR = ("monitoring.coreos.com/v1/PodMonitor", "monitoring.coreos.com/v1/PrometheusRule")
# Of objects that are not Kubernetes' own.
FOREIGN = (
    "monitoring.coreos.com/v1",
    "leaderworkerset.x-k8s.io/v1",
    "keda.sh/v1alpha1",
    "gateway.networking.k8s.io/v1",
    "inference.networking.k8s.io/v1",
)

Object = dict[str, Any]
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@cache
def _files(values: str, kube: str, apis: tuple[str, ...], chart: Path, name: str) -> dict[str, str]:
    loaded = helm_python.Chart.load(str(chart))
    options = {"name": name, "namespace": "prod", "kube_version": kube, "api_versions": list(apis)}
    # The Python method has no argument for the cluster's API versions; the native function behind it has.
    found: dict[str, str] = json.loads(_native.call_string("helm_render", loaded._raw(), values, json.dumps(options)))
    return found


def files(
    values: Object, kube: str = "v1.34.0", apis: tuple[str, ...] = OPERATOR, chart: Path = CHART, name: str = "llm"
) -> dict[str, str]:
    """Each template's output by its path. Raises helm_python.HelmError as `helm template` would fail."""
    return _files(json.dumps(values), kube, apis, chart, name)


def render(values: Object, kube: str = "v1.34.0", apis: tuple[str, ...] = OPERATOR) -> list[Object]:
    """The objects of a release."""
    texts = [text for name, text in files(values, kube, apis).items() if name.endswith(".yaml")]
    return [found for text in texts for found in yaml.load_all(text, Loader=_LOADER) if found]


def find(objects: list[Object], kind: str, name: str) -> Object:
    """The one object of that kind and name."""
    (found,) = [one for one in objects if one["kind"] == kind and one["metadata"]["name"] == name]
    return found


def container(workload: Object) -> Object:
    """The first container of a Deployment."""
    found: Object = workload["spec"]["template"]["spec"]["containers"][0]
    return found


def env(found: Object) -> dict[str, str]:
    """A container's plain variables; those from elsewhere are left out."""
    return {one["name"]: one["value"] for one in found["env"] if "value" in one}


def fleet(**changes: Any) -> Object:
    """A small fleet file with some keys changed."""
    return {"model": "org/model", "pools": {"prefill": {"replicas": 2}, "decode": {}}, **changes}


CASES: dict[str, Object] = {
    "plain": fleet(),
    "gpus": yaml.safe_load((ROOT / "docs/examples/fleet-gpu.yaml").read_text()),
    "encoders": fleet(
        plugins=["disagg", "epd"],
        pools={"encode": {"replicas": 2}, "prefill": {"engine": {"args": ["--epd-no-local-encoder"]}}, "decode": {}},
        router={"encode": {"fetch": {"enabled": True}}, "membership": {"dns_interval_s": 2.0}},
    ),
    "any": fleet(pools={"any": {"replicas": 3, "env": {"A": "1"}}}, env={"B": "2", "VLLM_SUITE_FLEET_KEY": "f"}),
    "no plugin": fleet(plugins=[], pools={"decode": {}}),
    "cpu": fleet(
        model="/models/tiny",
        served_model_name="tiny",
        engine={"dtype": "float32", "limit_mm_per_prompt": {"image": {"count": 2}}, "kv_cache_memory_bytes": "1.5GiB"},
        kubernetes={"device": "cpu", "model": {"claim": "weights"}, "router": {"replicas": 1}, "surge": False},
    ),
    "large": fleet(
        engine={
            "max_num_batched_tokens": 1048576,
            "seed": 0,
            "enable_prefix_caching": False,
            "args": ["--disable-log-stats"],
        },
        pools={
            "prefill": {
                "engine": {
                    "tensor_parallel_size": 8,
                    "pipeline_parallel_size": 2,
                    "args": ["--override-generation-config", '{"top_k": 5}'],
                }
            },
            "decode": {"engine": {"data_parallel_size": 4, "tensor_parallel_size": 2, "enable_prefix_caching": True}},
        },
        slo={"ttft": "1.5s"},
        predicted={
            "rate": 8.0,
            "error": 0.25,
            "source": "roofline",
            "ttft": {"p50": "300ms", "p99": "900ms", "p50_low": "0.2s", "p50_high": "700ms"},
            "tpot": {"p50": "20ms", "p99": "31.5ms"},
        },
        router={"limits": {"body_bytes": 67108864, "buffered_answer_bytes": 1234567}, "port": 9000},
        kubernetes={
            "rdma": {"resource": "rdma/ib"},
            "image": {"digest": "sha256:" + "0" * 64, "pull_secrets": ["pull"]},
            "model": {"hub_secret": "hub", "cache_claim": "cache"},
            "placement": {"same_domain": "topology.kubernetes.io/zone", "same_domain_required": True},
            "instances": {
                "tolerations": [{"key": "gpu", "operator": "Exists"}],
                "resources": {"requests": {"cpu": "8", "memory": "64Gi"}},
                "labels": {"team": "a"},
            },
            "pools": {"decode": {"node_selector": {"gpu": "h200"}, "resources": {"requests": {"cpu": "16"}}}},
        },
    ),
    "switching": fleet(
        pools={"any": {"replicas": 4, "env": {"PASSWORD": "hidden"}}, "decode": {"engine": {"max_num_seqs": 8}}},
        roles={
            "control": True,
            "start": {"prefill": 1, "decode": 3},
            "limits": {"decode": {"max_num_batched_tokens": 512}},
            "scale": {"gpus": 8},
        },
        slo={"ttft": "1s", "attainment": 0.99},
        router={"auth": {"api_keys": ["client"]}, "membership": {"poll_interval_s": 0.25}},
        kubernetes={
            "controller": {"labels": {"team": "a"}},
            "keys": {"client_secret": "clients"},
            "gateway": {
                "parents": [{"name": "public", "namespace": "edge", "section": "https"}],
                "hostnames": ["llm.example.com"],
            },
            "discovery": "endpoints",
            "network_policies": {"clients": [{"podSelector": {}}], "metrics_from": [{"podSelector": {}}]},
            "pools": {
                "decode": {"autoscaling": {"kind": "hpa", "max_replicas": 4, "tokens_per_instance": 9000}},
            },
        },
    ),
    "scaled": fleet(
        router={"auth": {"api_keys": ["client"], "upstream_api_key": "up"}, "timeouts": {"total_s": 899.5}},
        kubernetes={
            "gateway": {"parents": [{"name": "inner"}], "picker": {"service": "picker"}},
            "network_policies": {
                "clients": [{"namespaceSelector": {"matchLabels": {"name": "apps"}}}],
                "metrics_from": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
            },
            "pools": {
                "prefill": {"autoscaling": {"kind": "keda", "max_replicas": 8, "tokens_per_instance": 40000}},
                "decode": {
                    "autoscaling": {"kind": "hpa", "min_replicas": 2, "max_replicas": 4, "tokens_per_instance": 9000}
                },
            },
        },
    ),
}

_SMALL = ("--model", "Qwen/Qwen3-0.6B", "--gpus", "2xRTX-4090", "--isl", "200", "--osl", "20", "--ttft", "200ms",
          "--tpot", "20ms", "--requests", "200", "--space", "pp=1", "tp=1", "tokens=2048", "seqs=256")  # fmt: skip
PLANS: dict[str, tuple[str, ...]] = {
    "planned colocated": (*_SMALL, "kinds=colocated"),
    "planned pd": (*_SMALL, "kinds=pd"),
    # Instances over two nodes of eight, and encoders.
    "planned epd": (
        "--model", "Qwen/Qwen2.5-VL-72B-Instruct", "--gpus", "40xH100", "--images", "1", "--isl", "500", "--osl", "20",
        "--ttft", "3s", "--tpot", "100ms", "--requests", "100", "--space", "pp=1", "tp=16", "wide_tp=yes",
        "encode_tp=1", "kinds=epd", "seqs=64", "tokens=4096",
    ),
}  # fmt: skip
"""Arguments of `vllm-suite plan`, by a name for what it finds."""
