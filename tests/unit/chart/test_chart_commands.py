"""What the chart's containers run is what vLLM and `vllm-suite` take, and their ports are those they listen on."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart_render import CASES, PLANS, ROOT, Object, container, env, find, fleet, render

from vllm_suite.cli.main import build_parser
from vllm_suite.fleet.engine import EngineSpec
from vllm_suite.fleet.tiny import make_tiny_model

# A value of each key of `engine`, as a fleet file has it.
EVERY: Object = {
    "tensor_parallel_size": 2,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 2,
    "dtype": "bfloat16",
    "quantization": "fp8",
    "load_format": "safetensors",
    "revision": "main",
    "tokenizer": "org/tokenizer",
    "trust_remote_code": True,
    "max_model_len": 4096,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 8192,
    "block_size": 32,
    "kv_cache_memory_bytes": "2GiB",
    "gpu_memory_utilization": 0.85,
    "kv_cache_dtype": "fp8",
    "enforce_eager": False,
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "async_scheduling": False,
    "generation_config": "vllm",
    "chat_template": "{{ messages }}",
    "seed": 7,
    "kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"},
    "ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_both"},
    "ec_manager_config": {"encoder_cache_manager_cls": "a.B"},
    "limit_mm_per_prompt": {"image": 16},
    "mm_processor_kwargs": {"max_pixels": 50176},
    "additional_config": {"a": {"b": [1]}},
    "args": ["--max-logprobs", "5"],
}
NAMES = [*CASES, *PLANS, "every key"]


@pytest.fixture(scope="module")
def fleets(planned: dict[str, Path]) -> dict[str, Object]:
    plans = {name: yaml.safe_load(path.read_text()) for name, path in planned.items()}
    return {**CASES, **plans, "every key": fleet(engine=EVERY)}


def instances(values: Object) -> Iterator[tuple[str, Object]]:
    """Containers with vLLM by a name of their own; a worker of a LeaderWorkerSet is one too."""
    for found in render(values):
        called = found["metadata"]["name"]
        if found["kind"] == "LeaderWorkerSet":
            template = found["spec"]["leaderWorkerTemplate"]
            yield called, template["leaderTemplate"]["spec"]["containers"][0]
            yield f"{called} worker", template["workerTemplate"]["spec"]["containers"][0]
        elif found["kind"] == "Deployment" and container(found)["command"] == ["vllm"]:
            yield called, container(found)


def as_kubelet(text: str) -> str:
    """Variables put in as Kubernetes does."""
    known = {"LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "llm-0.llm", "POD_IP": "10.0.0.7"}
    for name, value in known.items():
        text = text.replace(f"$({name})", value)
    return text.replace("$$(", "$(")


@pytest.fixture(scope="module")
def parsed(fleets: dict[str, Object], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Object]:
    """vLLM's arguments for every container of every case, from one process that imports vLLM once."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed; run `make setup`")
    wanted: dict[tuple[str, str], Object] = {}
    names = [name for name in EngineSpec.model_fields if name != "args"]
    for name in NAMES:
        for called, one in instances(fleets[name]):
            environ = {key: as_kubelet(value) for key, value in env(one).items()}
            environ["VLLM_SUITE_INSTANCE_ID"] = "pod-0"
            want = [*names, "model_tag", "host", "port", "nnodes", "node_rank", "master_addr", "headless"]
            argv = [as_kubelet(word) for word in one["args"]]
            wanted[name, called] = {"argv": argv, "env": environ, "want": want}
    folder = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(here / "parse_commands.py"), str(folder)],
        input=json.dumps(list(wanted.values())),
        env=clean | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests/engine"), *sys.path]), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(wanted, json.loads(done.stdout.strip().splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_vllm_takes_its_arguments_and_its_environment(
    name: str, fleets: dict[str, Object], parsed: dict[tuple[str, str], Object]
) -> None:
    values = fleets[name]
    seen = 0
    for called, _ in instances(values):
        found = parsed[name, called]
        assert not {"exit", "crash"} & set(found), found
        assert (found["model_tag"], found["host"], found["port"]) == (values["model"], "0.0.0.0", 8000)
        role = called.split()[0].removeprefix("llm-")
        sizes = {**values.get("engine", {}), **(values["pools"][role] or {}).get("engine", {})}
        for key in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            assert found[key] == sizes.get(key, 1), key
        several = sizes.get("tensor_parallel_size", 1) * sizes.get("pipeline_parallel_size", 1) > 8
        assert found["nnodes"] == (2 if several else 1)
        assert found["headless"] is called.endswith("worker")
        if several:
            assert (found["node_rank"], found["master_addr"]) == (1, "llm-0.llm")
        seen += 1
    assert seen >= len([role for role in values["pools"] if values["pools"][role] is not None])


def test_every_key_of_the_engine_is_an_argument_of_vllm(parsed: dict[tuple[str, str], Object]) -> None:
    assert set(EVERY) == set(EngineSpec.model_fields)
    found = parsed["every key", "llm-decode"]
    for name, value in EVERY.items():
        if name == "args":
            continue
        if name == "kv_cache_memory_bytes":
            value = 2 << 30
        if name.endswith("_config") and isinstance(value, dict) and name != "additional_config":
            assert all(str(part) in str(found[name]) for part in value.values()), name
        elif name in ("dtype", "limit_mm_per_prompt"):
            assert found[name], name
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("name", NAMES)
def test_ports_and_probes_are_where_the_instance_listens(name: str, fleets: dict[str, Object]) -> None:
    for called, one in instances(fleets[name]):
        if called.endswith("worker"):
            assert "ports" not in one
            continue
        ports = {entry["name"]: entry["containerPort"] for entry in one["ports"]}
        args, given = one["args"], env(one)
        assert ports.pop("api") == int(args[args.index("--port") + 1])
        assert ports.pop("nixl-0") == int(given["VLLM_NIXL_SIDE_CHANNEL_PORT"])
        items = given.get("VLLM_EC_SIDE_CHANNEL_PORT")
        assert ports.pop("items-0", None) == (int(items) if items else None)
        # vLLM adds the index of a data-parallel rank to the first port of each kind.
        width = int(args[args.index("--data-parallel-size") + 1]) if "--data-parallel-size" in args else 1
        assert len(ports) == (width - 1) * (2 if items else 1)
        listed = {entry["name"] for entry in one["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked: dict[str, Any] = one[probe]
            assert asked.get("httpGet", {"port": "api"})["port"] in listed
        commands = [one["readinessProbe"].get("exec", {}), one["lifecycle"]["preStop"]["exec"]]
        urls = [word for found in commands for word in found.get("command", []) if word.startswith("--url=")]
        assert set(urls) <= {"--url=http://127.0.0.1:8000"}
        service = find(render(fleets[name]), "Service", called)
        assert [port["targetPort"] for port in service["spec"]["ports"]] == ["api"]


@pytest.mark.parametrize("name", NAMES)
def test_the_other_commands_are_those_of_vllm_suite(name: str, fleets: dict[str, Object]) -> None:
    objects = render(fleets[name])
    for found in (one for one in objects if one["kind"] == "Deployment"):
        one = container(found)
        if one["command"] == ["vllm-suite"]:
            args = build_parser((one["args"][0],)).parse_args(one["args"])
            assert callable(args.run)
            mounted = [mount["mountPath"] for mount in one["volumeMounts"]]
            paths = [word for word in one["args"] if word.startswith("/")]
            assert paths
            assert all(any(path.startswith(folder + "/") for folder in mounted) for path in paths)
    service = find(objects, "Service", "llm-router")["spec"]["ports"]
    router = container(find(objects, "Deployment", "llm-router"))
    assert [port["targetPort"] for port in service] == [port["name"] for port in router["ports"]]
