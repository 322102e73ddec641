"""The chart's schema is the fleet file's, is current, refuses what is wrong, and is inside the packaged chart."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from chart_render import CASES, CHART, ROOT, files, fleet, render

from vllm_suite.cli.main import main
from vllm_suite.fleet.files import FleetFileError, parse_fleet
from vllm_suite.fleet.kubernetes import KubernetesSpec
from vllm_suite.fleet.spec import FleetSpec


def test_generated_files_are_current() -> None:
    assert main(["fleet", "schema", str(CHART), "--check"]) == 0, "run: vllm-suite fleet schema charts/vllm-suite"


def test_a_stale_file_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    schema = chart / "values.schema.json"
    schema.write_text(schema.read_text().replace("replicas", "replica_count"))
    assert main(["fleet", "schema", str(chart), "--check"]) == 1
    assert "values.schema.json is not current" in capsys.readouterr().err
    assert main(["fleet", "schema", str(chart)]) == 0
    assert main(["fleet", "schema", str(chart), "--check"]) == 0


def test_the_command_refuses_a_folder_that_is_no_chart(tmp_path: Path) -> None:
    assert main(["fleet", "schema", str(tmp_path)]) == 2


def test_values_are_the_defaults_of_the_model() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert KubernetesSpec.model_validate(values["kubernetes"]) == KubernetesSpec()
    assert tuple(values["plugins"]) == FleetSpec.model_fields["plugins"].default


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_a_fleet_file(name: str) -> None:
    parse_fleet(yaml.safe_dump(CASES[name]))


@pytest.mark.parametrize("example", sorted((ROOT / "docs/examples").glob("fleet-*.yaml")), ids=lambda path: path.name)
def test_examples_pass_the_schema(example: Path) -> None:
    values = yaml.safe_load(example.read_text())
    if values["model"].startswith("build/"):
        values["model"] = "org/model"  # a folder of this machine
    assert render(values)


def predicting(**times: str) -> dict[str, Any]:
    """A fleet file whose prediction has these times, and a p50 and p99 that go together."""
    ttft = {"p50": "2ms", "p99": "1s", **times}
    return fleet(predicted={"rate": 12.5, "ttft": ttft, "error": 0.1, "source": "roofline"})


def test_a_prediction_is_part_of_the_values() -> None:
    bounds = {"p50_low": "1.5ms", "p50_high": "0.003s", "p99_low": "999999us", "p99_high": "1m"}
    assert render(predicting(**bounds))
    assert render(fleet(predicted=None))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (fleet(replicas=3), "replicas"),
    "unknown key in kubernetes": (fleet(kubernetes={"imge": {}}), "imge"),
    "text for a number": (fleet(pools={"decode": {"replicas": "many"}}), "replicas"),
    "no model": ({"pools": {"decode": {}}}, "model"),
    "unknown plugin": (fleet(plugins=["disag"]), "plugins"),
    "duration without unit": (fleet(slo={"ttft": "300"}), "ttft"),
    "every request within the targets": (fleet(slo={"attainment": 1}), "attainment"),
    "nothing decodes": (fleet(pools={"prefill": {}}), "decode or an any"),
    "encoders without epd": (fleet(pools={"encode": {}, "decode": {}}), "needs? plugin epd|need plugin epd"),
    "a controller of nothing": (fleet(roles={"control": True}), "pools.any"),
    "more roles than instances": (fleet(pools={"any": {}}, roles={"start": {"decode": 2}}), "roles.start"),
    "a file of up": (fleet(router={"membership": {"withdrawn_file": "/a"}}), "of its own instances"),
    "stages that decode": (
        fleet(pools={"prefill": {}, "decode": {"engine": {"pipeline_parallel_size": 2}}}),
        "pools.decode: pipeline_parallel_size: vLLM's NIXL connector takes no pipeline stages on decode; "
        "use tensor_parallel_size",
    ),
    "stages that decode, for all roles": (
        fleet(engine={"pipeline_parallel_size": 2}),
        "pools.decode: pipeline_parallel_size: vLLM's NIXL connector",
    ),
    "stages and encoders": (
        fleet(
            plugins=["disagg", "epd"],
            pools={"encode": {}, "prefill": {"engine": {"pipeline_parallel_size": 2}}, "decode": {}},
        ),
        "pools.prefill: pipeline_parallel_size: encoder outputs are not taken by pipeline stages; "
        "use tensor_parallel_size",
    ),
    "encoders for a text model": (
        fleet(
            plugins=["disagg", "epd"], pools={"encode": {}, "decode": {"engine": {"args": ["--language-model-only"]}}}
        ),
        "pools.decode: --language-model-only refuses media, so there is nothing for pools.encode to encode",
    ),
    "encoders to begin with, without epd": (
        fleet(pools={"any": {"replicas": 2}}, roles={"start": {"encode": 1}}),
        "roles.start.encode: encoding needs plugin epd; plugins is",
    ),
    "keys of clients without one of the fleet's own": (
        fleet(kubernetes={"keys": {"existing_secret": "fleet", "client_secret": "clients"}}),
        "client_secret: existing_secret needs an api-key too",
    ),
    "bad quantity": (fleet(kubernetes={"shm_size": "much"}), "shm_size"),
    "two model sources": (
        fleet(model="/models/a", kubernetes={"model": {"claim": "a", "image": "b"}}),
        "claim or image",
    ),
    "scaled to less than nothing": (
        fleet(
            kubernetes={
                "pools": {
                    "decode": {
                        "autoscaling": {
                            "kind": "hpa",
                            "min_replicas": 3,
                            "max_replicas": 2,
                            "tokens_per_instance": 1,
                        }
                    }
                }
            }
        ),
        "max_replicas is below",
    ),
    "a key that everybody knows": (fleet(router={"auth": {"api_keys": [""]}}), "minLength|key"),
    "unknown key in the prediction": (predicting(p95="3ms"), "p95"),
    "half of the requests slower than 99 in 100": (predicting(p99="1ms"), "p50 2ms is above p99 1ms"),
    "a bound on the wrong side": (predicting(p50_high="1.5ms"), "p50 2ms is above p50_high 1.5ms"),
    "a prediction without its error bar": (fleet(predicted={"rate": 1.0, "source": "a"}), "error"),
    "a key is asked for that is not there": (fleet(kubernetes={"keys": {"require_api_key": True}}), "existing_secret"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_refused_by_both(name: str) -> None:
    values, says = WRONG[name]
    with pytest.raises(helm_python.HelmError, match=says):
        files(values)
    with pytest.raises(FleetFileError):
        parse_fleet(yaml.safe_dump(values))


HERE_ONLY: dict[str, tuple[dict[str, Any], str]] = {
    "key file": (fleet(router={"auth": {"api_key_file": "/etc/keys"}}), "existing_secret"),
    "two places for keys": (
        fleet(router={"auth": {"control_key": "a"}}, kubernetes={"keys": {"existing_secret": "s"}}),
        "leave them out of router.auth",
    ),
    "folder without volume": (fleet(model="/models/a"), "which claim or image"),
    "folder elsewhere": (fleet(model="/data/a", kubernetes={"model": {"claim": "a"}}), "not below"),
    "key in the environment": (fleet(env={"VLLM_API_KEY": "a"}), "set by the chart"),
    "ragged nodes": (
        fleet(pools={"decode": {"engine": {"tensor_parallel_size": 12}}}),
        "do not fill nodes",
    ),
    "two that scale": (
        fleet(
            pools={"any": {}},
            roles={"scale": {"gpus": 8}},
            kubernetes={
                "pools": {"any": {"autoscaling": {"kind": "hpa", "max_replicas": 2, "tokens_per_instance": 1}}}
            },
        ),
        "would both set the size",
    ),
    "a size by a role that nobody has": (
        fleet(
            pools={"any": {}},
            roles={"control": True},
            kubernetes={
                "pools": {"any": {"autoscaling": {"kind": "hpa", "max_replicas": 2, "tokens_per_instance": 1}}}
            },
        ),
        "use roles.scale",
    ),
    "hosts of no gateway": (fleet(kubernetes={"gateway": {"hostnames": ["a.example.com"]}}), "give parents"),
    "services by hand": (
        fleet(router={"membership": {"kubernetes": [{"service": "a", "port": 1}]}}),
        "discovery is endpoints",
    ),
    "learned lengths": (fleet(router={"lengths": {"state_file": "/a"}}), "keeps no files"),
}


@pytest.mark.parametrize("name", HERE_ONLY)
def test_what_a_cluster_cannot_have_is_refused(name: str) -> None:
    values, says = HERE_ONLY[name]
    parse_fleet(yaml.safe_dump(values))
    with pytest.raises(helm_python.HelmError, match=says):
        files(values)


def test_a_release_begins_with_a_letter_and_may_be_long() -> None:
    with pytest.raises(helm_python.HelmError, match="begin with a letter"):
        files(fleet(), name="42")
    for text in files(CASES["switching"], name="a" * 53).values():
        for found in yaml.safe_load_all(text) if "apiVersion:" in text else ():
            limit = 63 if found and found["kind"] in ("Service", "LeaderWorkerSet") else 253
            assert not found or len(found["metadata"]["name"]) <= limit


def test_an_image_volume_needs_a_cluster_that_has_them() -> None:
    values = fleet(model="/models/a", kubernetes={"model": {"image": "registry/model:1"}})
    with pytest.raises(helm_python.HelmError, match=r"1\.33 or later"):
        files(values, "v1.32.0")
    assert render(values, "v1.34.0")


def test_helm_would_install_it() -> None:
    """Helm's own installation up to the API server: order, hooks and notes."""
    with contextlib.closing(helm_python.Config(storage_driver="memory")) as config:
        release = config.install(
            helm_python.Chart.load(str(CHART)), "llm", CASES["switching"], namespace="prod", dry_run="client"
        )
    kinds = [found["kind"] for found in yaml.safe_load_all(release["manifest"]) if found]
    first = kinds.index("Deployment")
    for kind in ("NetworkPolicy", "ServiceAccount", "Secret", "ConfigMap", "Role", "RoleBinding", "Service"):
        assert kinds.index(kind) < first, kind
    assert "Pod" not in kinds  # the test is a hook
    assert "helm test llm -n prod" in release["notes"]


def test_the_packaged_chart_keeps_its_schema(tmp_path: Path) -> None:
    package = helm_python.package(str(CHART), destination=str(tmp_path))
    assert helm_python.Chart.load(package).schema is not None
    with pytest.raises(helm_python.HelmError, match="replicas"):
        files(fleet(replicas=3), chart=Path(package))
    assert files(CASES["large"], chart=Path(package)).keys() == files(CASES["large"]).keys()
