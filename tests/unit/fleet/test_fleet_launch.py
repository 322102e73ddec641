"""From a fleet to commands: flags, environment, GPUs, keys."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vllm_suite.fleet import launch as launch_module
from vllm_suite.fleet import up
from vllm_suite.fleet.demo_spec import DemoOptions, demo_fleet, single_engine
from vllm_suite.fleet.devices import DeviceError, assign, visible_gpus
from vllm_suite.fleet.launch import Launch, ModelError, plan_instances
from vllm_suite.fleet.launch_front import plan_router, router_config
from vllm_suite.fleet.spec import FleetSpec
from vllm_suite.router.config import RouterConfig

KEYS = ("VLLM_SUITE_API_KEY", "VLLM_SUITE_UPSTREAM_API_KEY", "VLLM_SUITE_CONTROL_KEY", "VLLM_API_KEY")


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)


def fleet(**over: Any) -> FleetSpec:
    data: dict[str, Any] = {"model": "m", "pools": {"prefill": {}, "decode": {}}, "local": {"device": "cpu"}}
    return FleetSpec.model_validate({**data, **over})


def after(launch: Launch, flag: str) -> str:
    """The word after a flag."""
    return launch.argv[launch.argv.index(flag) + 1]


def test_a_cpu_instance() -> None:
    prefill, decode = plan_instances(fleet(served_model_name="s", engine={"kv_cache_memory_bytes": "1GiB"}))
    assert prefill.argv[1:3] == ("serve", "m")
    assert after(prefill, "--plugins") == "disagg"
    assert after(prefill, "--served-model-name") == "s"
    assert after(prefill, "--kv-cache-memory-bytes") == str(2**30)
    assert "--enforce-eager" in prefill.argv
    assert prefill.env["CUDA_VISIBLE_DEVICES"] == ""
    assert prefill.env["OMP_NUM_THREADS"] == "1"
    assert prefill.env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "VLLM_CPU_KVCACHE_SPACE" not in prefill.environment({"VLLM_CPU_KVCACHE_SPACE": "40"})
    assert (prefill.env["VLLM_SUITE_ROLE"], decode.env["VLLM_SUITE_ROLE"]) == ("prefill", "decode")
    assert prefill.env["VLLM_SUITE_INSTANCE_ID"] == "fleet-prefill-0"
    assert prefill.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "15600"
    assert decode.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "15601"
    assert (prefill.url, decode.url) == ("http://127.0.0.1:8100", "http://127.0.0.1:8101")
    assert prefill.ports == (8100, 15600)


def test_an_encoder_is_told_where_to_serve_its_outputs() -> None:
    pools = {"encode": {"replicas": 2}, "prefill": {}, "decode": {}}
    spec = fleet(plugins=["disagg", "epd"], pools=pools, engine={"limit_mm_per_prompt": {"image": 4}})
    first, second, prefill, decode = plan_instances(spec)
    assert first.env["VLLM_SUITE_ROLE"] == "encode"
    assert after(first, "--plugins") == "disagg,epd"
    assert json.loads(after(first, "--limit-mm-per-prompt")) == {"image": 4}
    assert first.env["VLLM_EC_SIDE_CHANNEL_HOST"] == "127.0.0.1"
    assert [one.env["VLLM_EC_SIDE_CHANNEL_PORT"] for one in (first, second)] == ["16600", "16601"]
    assert second.ports == (8101, 15601, 16601)
    assert not any("VLLM_EC_SIDE_CHANNEL_PORT" in one.env for one in (prefill, decode))
    config = RouterConfig.model_validate(yaml.safe_load(router_config(spec, plan_instances(spec))))
    assert [target.role for target in config.membership.static] == ["encode", "encode", "prefill", "decode"]


def test_a_text_model_has_nothing_to_encode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pools: dict[str, Any] = {"encode": {}, "any": {}}
    spec = fleet(model=str(tmp_path), plugins=["disagg", "epd"], pools=pools)
    config = tmp_path / "config.json"
    plan_instances(spec)  # no file: it may be a hub name
    config.write_text('{"model_type": "llama", "hidden_size": 8}')
    with pytest.raises(ModelError, match="is a text model"):
        plan_instances(spec)
    assert up.dry_run(spec) == 1
    assert "is a text model" in capsys.readouterr().err
    config.write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        plan_instances(spec)
    config.write_text('{"vision_config": {}}')
    assert [one.role for one in plan_instances(spec)] == ["encode", "any"]


def test_cpu_defaults_can_be_overridden() -> None:
    (one,) = plan_instances(fleet(pools={"any": {"engine": {"enforce_eager": False}, "env": {"OMP_NUM_THREADS": "3"}}}))
    assert "--no-enforce-eager" in one.argv
    assert one.env["OMP_NUM_THREADS"] == "3"
    assert after(one, "--kv-cache-memory-bytes") == str(2**30)


def test_the_worker_has_a_process_of_its_own_only_where_it_must() -> None:
    (one,) = plan_instances(fleet(pools={"any": {}}))
    (two,) = plan_instances(fleet(pools={"any": {"engine": {"tensor_parallel_size": 2}}}))
    assert one.env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in two.env


def test_gpus_are_placed_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "visible_gpus", lambda: ("0", "1", "2", "3"))
    spec = fleet(
        local={"device": "auto"},
        engine={"tensor_parallel_size": 2},
        pools={"prefill": {}, "decode": {"replicas": 2, "engine": {"tensor_parallel_size": 1}}},
    )
    launches = plan_instances(spec)
    assert [launch.env["CUDA_VISIBLE_DEVICES"] for launch in launches] == ["0,1", "2", "3"]
    assert not any("--enforce-eager" in launch.argv or "OMP_NUM_THREADS" in launch.env for launch in launches)
    with pytest.raises(DeviceError, match="needs 5 GPUs and 4 can be used"):
        plan_instances(
            spec.model_copy(update={"pools": spec.pools.model_copy(update={"any": spec.pools.decode})}).model_copy(
                update={"engine": spec.engine.model_copy(update={"tensor_parallel_size": 1})}
            )
        )


def test_instances_that_share_a_gpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "visible_gpus", lambda: ("0",))
    launches = plan_instances(fleet(local={"share_gpus": True}))
    assert [after(launch, "--gpu-memory-utilization") for launch in launches] == ["0.425", "0.425"]
    (alone,) = plan_instances(fleet(local={}, pools={"any": {}}))
    assert "--gpu-memory-utilization" not in alone.argv


def test_gpus_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "visible_gpus", lambda: ("0", "1"))
    with pytest.raises(DeviceError, match=r"names 7; usable here: 0, 1"):
        plan_instances(fleet(local={"gpus": [1, 7]}))
    monkeypatch.setattr(launch_module, "visible_gpus", lambda: ())
    with pytest.raises(DeviceError, match="no NVIDIA driver answers"):
        plan_instances(fleet(local={"device": "gpu"}))


def test_cuda_visible_devices_limits_what_is_used() -> None:
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2, 5"}) == ("2", "5")
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == ()


@given(st.lists(st.integers(1, 4), max_size=8), st.integers(0, 16), st.booleans())
def test_assignment(sizes: list[int], count: int, share: bool) -> None:
    gpus = [str(index) for index in range(count)]
    try:
        placed = assign(sizes, gpus, share)
    except DeviceError:
        assert max(sizes, default=0) > count or (not share and sum(sizes) > count)
        return
    assert [len(set(chosen)) for chosen in placed] == sizes
    uses = [sum(gpu in chosen for chosen in placed) for gpu in gpus]
    assert max(uses, default=0) - min(uses, default=0) <= 1
    if not share:
        assert max(uses, default=0) <= 1


def test_the_router_gets_the_instances_and_its_own_settings() -> None:
    spec = fleet(router={"port": 9000, "disaggregation": {"min_prompt_tokens": 7}})
    instances = plan_instances(spec)
    config = RouterConfig.model_validate(yaml.safe_load(router_config(spec, instances)))
    assert [(t.url, t.role) for t in config.membership.static] == [
        ("http://127.0.0.1:8100", "prefill"), ("http://127.0.0.1:8101", "decode"),
    ]  # fmt: skip
    assert config.membership.state == "suite"
    assert config.disaggregation.min_prompt_tokens == 7
    router = plan_router(spec, instances)
    assert router.argv[:4] == (sys.executable, "-m", "vllm_suite.cli.main", "router")
    assert router.url == "http://127.0.0.1:9000"


def test_keys_reach_the_processes_and_nothing_that_is_printed() -> None:
    auth = {"api_keys": ["s3cret-1"], "upstream_api_key": "s3cret-2", "control_key": "s3cret-3"}
    spec = fleet(router={"auth": auth})
    instances = plan_instances(spec)
    router = plan_router(spec, instances)
    assert instances[0].env["VLLM_API_KEY"] == "s3cret-2"
    assert instances[0].env["VLLM_SUITE_CONTROL_KEY"] == instances[0].control_key == "s3cret-3"
    assert router.env["VLLM_SUITE_API_KEY"] == "s3cret-1"
    assert router.env["VLLM_SUITE_UPSTREAM_API_KEY"] == "s3cret-2"
    assert router.control_key == "s3cret-3"
    for launch in (*instances, router):
        assert "s3cret" not in launch.shell() + repr(launch) + " ".join(launch.argv)
    assert "s3cret" not in router_config(spec, instances)


def test_the_router_shares_the_fleet_key_of_its_instances() -> None:
    spec = fleet(env={"VLLM_SUITE_FLEET_KEY": "fleet-k", "OTHER": "1"})
    instances = plan_instances(spec)
    router = plan_router(spec, instances)
    assert {launch.env["VLLM_SUITE_FLEET_KEY"] for launch in (*instances, router)} == {"fleet-k"}
    assert "OTHER" not in router.env
    assert "fleet-k" not in router.shell()
    headers = plan_instances(fleet(env={"OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer s3cret"}))
    assert "s3cret" not in headers[0].shell()
    # Not over one that it inherits.
    assert "VLLM_SUITE_FLEET_KEY" not in plan_router(fleet(), []).env


def test_vllms_own_key_in_the_environment_is_sent_by_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "env-k")
    spec = fleet()
    instances = plan_instances(spec)
    assert instances[0].control_key == "env-k"
    assert plan_router(spec, instances).env["VLLM_SUITE_UPSTREAM_API_KEY"] == "env-k"


def test_several_keys_belong_into_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="put several into api_key_file"):
        fleet(router={"auth": {"api_keys": ["a", "b"]}})
    (tmp_path / "keys").write_text("# ours\n\nfirst-k\nsecond-k\n")
    spec = fleet(router={"auth": {"api_key_file": str(tmp_path / "keys")}})
    assert plan_router(spec, []).control_key == "first-k"


def test_dry_run_prints_commands_that_a_shell_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = fleet(
        local={"device": "cpu", "log_dir": str(tmp_path)},
        engine={"kv_transfer_config": {"kv_connector": "NixlConnector"}, "chat_template": "it's {{ x }}"},
    )
    assert up.dry_run(spec, tmp_path / "out.json") == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("env ")]
    launches = [*plan_instances(spec), plan_router(spec, [])]
    assert len(printed) == 3
    for line, launch in zip(printed, launches, strict=True):
        assert tuple(shlex.split(line)[-len(launch.argv) :]) == launch.argv
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["command"] for row in written["processes"]] == printed
    assert written["versions"]["suite"]


def test_the_demo_compares_with_a_plain_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    spec = demo_fleet(DemoOptions(folder=tmp_path), "m")
    assert spec.router.disaggregation.min_prompt_tokens == 0
    _, (plain,) = single_engine(spec)
    assert "--plugins" not in plain.argv
    assert "--kv-transfer-config" not in plain.argv
    assert plain.ready == "health"
    # Apart from the plugin and its names, the flags are the fleet's.
    prefill = plan_instances(spec)[0]
    own = {"--plugins", "disagg", "--port", after(prefill, "--port"), after(plain, "--port")}
    assert [word for word in plain.argv if word not in own] == [word for word in prefill.argv if word not in own]


def test_the_demo_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    spec = demo_fleet(DemoOptions(model="org/model", folder=tmp_path), "org/model")
    launches = plan_instances(spec)
    for launch in launches:
        assert launch.env["CUDA_VISIBLE_DEVICES"] == "0"
        assert launch.env["VLLM_BATCH_INVARIANT"] == "1"
        assert not {"--enforce-eager", "--kv-cache-memory-bytes", "--dtype"} & set(launch.argv)
