"""FleetSpec: what a file may say, and what it means for ports and flags."""

from __future__ import annotations

import dataclasses
import importlib.util
import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_suite.fleet.engine import OWNED_FLAGS, EngineSpec
from vllm_suite.fleet.files import FleetFileError, dump_fleet, parse_fleet
from vllm_suite.fleet.spec import FleetSpec, PoolSpec, RestartSpec
from vllm_suite.fleet.units import parse_bytes, parse_duration_ms

EPD = "model: m\nplugins: [disagg, epd]\n"
MINIMAL = "model: m\npools: {any: {}}\n"


names = st.text(string.ascii_lowercase, min_size=1, max_size=8)
engines = st.fixed_dictionaries(
    {},
    optional={
        "tensor_parallel_size": st.integers(1, 8),
        "data_parallel_size": st.integers(1, 4),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "max_model_len": st.integers(1, 10**6),
        "kv_cache_memory_bytes": st.sampled_from(["256MiB", "2GB", 12345]),
        "gpu_memory_utilization": st.floats(0.01, 1.0),
        "enforce_eager": st.booleans(),
        "kv_transfer_config": st.dictionaries(names, st.integers() | names, max_size=2),
        "args": st.lists(st.sampled_from(["--max-lora-rank=8", "--swap-space", "4"]), max_size=3),
    },
)
pools = st.fixed_dictionaries(
    {"decode": st.fixed_dictionaries({"replicas": st.integers(1, 5), "engine": engines})},
    optional={
        "prefill": st.fixed_dictionaries({"replicas": st.integers(0, 5), "env": st.dictionaries(names, names)}),
        "any": st.fixed_dictionaries({"replicas": st.integers(0, 3), "engine": engines}),
    },
)
fleets = st.fixed_dictionaries(
    {"model": names, "pools": pools, "plugins": st.sampled_from([["disagg"], ["disagg", "epd"], []])},
    optional={
        "engine": engines,
        "slo": st.fixed_dictionaries(
            {},
            optional={
                "ttft": st.floats(0.001, 1e6).map(lambda ms: f"{ms}ms"),
                "attainment": st.floats(0, 1, exclude_min=True, exclude_max=True),
            },
        ),
        "local": st.fixed_dictionaries(
            {},
            optional={
                "first_port": st.integers(1, 65_535),
                "first_side_channel_port": st.integers(1, 65_535),
                "cpu_threads": st.integers(1, 64),
            },
        ),
    },
)


def build(data: dict[str, Any]) -> FleetSpec | None:
    """The spec, or None where the drawn ports do not fit."""
    try:
        return FleetSpec.model_validate(data)
    except ValueError as error:
        if "port" not in str(error):
            raise
        return None


@settings(deadline=None)  # the first example pays for imports, on a loaded machine more than a deadline
@given(fleets)
def test_a_fleet_survives_yaml(data: dict[str, Any]) -> None:
    spec = build(data)
    if spec is not None:
        assert parse_fleet(dump_fleet(spec)) == spec


@settings(deadline=None)
@given(fleets)
def test_ports_never_collide(data: dict[str, Any]) -> None:
    spec = build(data)
    if spec is None:
        return
    ports = [port for port, _ in spec.ports()]
    assert len(set(ports)) == len(ports)
    assert all(1 <= port <= 65_535 for port in ports)
    widths = [spec.width(one.pool) for one in spec.instances()]
    items = [spec.width(one.pool) for one in spec.instances() if one.items is not None]
    assert len(ports) == 1 + len(widths) + sum(widths) + sum(items)
    encodes = "epd" in spec.plugins
    assert all((one.items is not None) == (encodes and one.role in ("encode", "any")) for one in spec.instances())


def test_a_collision_is_refused_and_says_who() -> None:
    with pytest.raises(FleetFileError, match=r"port 8101 is both the router and the API of fleet-any-1"):
        parse_fleet("model: m\npools: {any: {replicas: 2}}\nrouter: {port: 8101}\n")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: m\npools: {any: {}}\nrouters: {}\n", "routers: unknown key (did you mean 'router'?)"),
        ("model: m\npools: {any: {replica: 2}}\n", "pools.any.replica: unknown key (did you mean 'replicas'?)"),
        (
            "model: m\npools: {decode: {engine: {max_len: 1}}}\n",
            "pools.decode.engine.max_len: unknown key (did you mean 'max_model_len'?)",
        ),
        ("model: m\npools: {any: {}}\nlocal: {restart: {x: 1}}\n", "local.restart.x: unknown key"),
        ("model: m\npools: {any: {}}\nrouter: {limits: {body: 1}}\n", "router.limits.body: unknown key"),
        ("model: m\npools: {any: {}}\nslo: {ttft: 300}\n", "slo.ttft: not a duration with a unit"),
        ("model: m\npools: {any: {}}\nplugins: [nope]\n", "plugins: unknown plugin 'nope'"),
        ("model: m\npools: {any: {}}\nmodel: n\n", "key 'model' is given twice"),
        ("model: m\npools: {prefill: {}}\n", "prefill instances need a decode or an any instance"),
        (EPD + "pools: {encode: {}}\n", "encode instances need a decode or an any instance"),
        (EPD + "pools: {encode: {}, prefill: {}}\n", "prefill instances need a decode or an any instance"),
        ("model: m\npools: {encode: {}, any: {}}\n", "encoder instances need plugin epd; plugins is ['disagg']"),
        (
            EPD + "pools: {encode: {}, any: {engine: {args: [--language-model-only]}}}\n",
            "pools.any: --language-model-only refuses media",
        ),
        (EPD + "pools: {encode: {}, any: {engine: {pipeline_parallel_size: 2}}}\n", "not taken by pipeline stages"),
        (EPD + "pools: {decode: {engine: {pipeline_parallel_size: 2}}}\n", "no pipeline stages on decode"),
        (EPD + "pools: {encode: {}, any: {}}\nlocal: {first_item_port: 15600}\n", "port 15600 is both"),
        ("model: m\npools: {any: {replicas: 0}}\n", "the fleet has no instance"),
        ("model: m\npools: {any: {}}\nlocal: {host: 0.0.0.0}\n", "local.host: peers cannot connect to a wildcard"),
        ("model: m\npools: {any: {engine: {args: [--port=1]}}}\n", "--port is set for each instance"),
        ("[]", "a mapping is expected"),
        ("model: [", "not YAML"),
    ],
)
def test_a_wrong_file_names_the_key(text: str, says: str) -> None:
    with pytest.raises(FleetFileError) as error:
        parse_fleet(text, "f.yaml")
    assert says in str(error.value)
    assert str(error.value).startswith("f.yaml: ")


@given(names)
def test_any_unknown_key_is_refused(key: str) -> None:
    for model, path in ((FleetSpec, ""), (PoolSpec, "pools.any"), (EngineSpec, "engine")):
        if key in model.model_fields:
            continue
        data: dict[str, Any] = {"model": "m", "pools": {"any": {}}}
        at: dict[str, Any] = data
        for part in filter(None, path.split(".")):
            at = at.setdefault(part, {})
        at[key] = 1
        with pytest.raises(ValueError, match="Extra inputs are not permitted"):
            FleetSpec.model_validate(data)


def test_every_field_is_documented() -> None:
    seen: set[type] = set()

    def walk(model: Any) -> None:
        if model in seen or model.__module__.startswith("vllm_suite.router"):
            return
        seen.add(model)
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no description"
            for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if isinstance(inner, type) and hasattr(inner, "model_fields"):
                    walk(inner)

    walk(FleetSpec)
    assert len(seen) >= 6


def test_a_pool_overrides_key_by_key() -> None:
    shared = EngineSpec(max_model_len=1000, enforce_eager=True, args=("--a",))
    merged = shared.overridden_by(EngineSpec(max_model_len=None, enable_prefix_caching=False, args=("--b",)))
    assert merged.flags() == ["--enforce-eager", "--no-enable-prefix-caching", "--a", "--b"]


def test_flags_are_vllms_own() -> None:
    """Every key of `engine` is an argument of `vllm serve`, and so is every flag that `up` sets."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    places = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.common.cli_args")  # 0.32, 0.33
    place = next(name for name in places if importlib.util.find_spec(name.rpartition(".")[0]))
    frontend = importlib.import_module(place).FrontendArgs
    known = {field.name for args in (AsyncEngineArgs, frontend) for field in dataclasses.fields(args)}
    assert set(EngineSpec.model_fields) - {"args"} <= known
    # --plugins is the suite's own.
    assert {flag[2:].replace("-", "_") for flag in OWNED_FLAGS} - {"plugins"} <= known


@pytest.mark.parametrize(
    ("text", "ms"), [("300ms", 300), ("1.5s", 1500), ("2m", 120_000), ("50 us", 0.05), ("1h", 3_600_000)]
)
def test_durations(text: str, ms: float) -> None:
    assert parse_duration_ms(text) == pytest.approx(ms)


@pytest.mark.parametrize("text", ["300", 300, "ms", "-1s", "1d", "", None, "1s1s"])
def test_wrong_durations(text: object) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration_ms(text)


@pytest.mark.parametrize(("text", "size"), [("256MiB", 2**28), ("2GB", 2 * 10**9), (7, 7), ("0.5kib", 512)])
def test_sizes(text: object, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["MiB", "1 furlong", True, None, "-1"])
def test_wrong_sizes(text: object) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes(text)


@given(st.integers(0, 10_000))
def test_restart_delay_doubles_up_to_its_bound(restarts: int) -> None:
    policy = RestartSpec.model_validate({"first_delay": "100ms", "max_delay": "5s"})
    delay = policy.delay_s(restarts)
    assert 0.1 <= delay <= 5.0
    assert policy.delay_s(restarts + 1) == min(5.0, 2 * delay)


def test_encoders_get_ports_for_their_outputs() -> None:
    text = "pools: {encode: {replicas: 2, engine: {data_parallel_size: 2}}, prefill: {}, decode: {}, any: {}}\n"
    spec = parse_fleet(EPD + text)
    assert [(one.role, one.side, one.items) for one in spec.instances()] == [
        ("encode", 15600, 16600), ("encode", 15602, 16602), ("prefill", 15604, None), ("decode", 15605, None),
        ("any", 15606, 16604),
    ]  # fmt: skip
    assert dict(spec.ports())[16603] == "the encoder outputs of fleet-encode-1"
    without = parse_fleet("model: m\npools: {any: {}}\n")
    assert [one.items for one in without.instances()] == [None]


def test_no_encoder_is_needed_for_an_empty_pool() -> None:
    assert parse_fleet("model: m\npools: {encode: {replicas: 0}, any: {}}\n").plugins == ("disagg",)


PREDICTED = """\
predicted:
  rate: 13.5
  ttft: {p50: 174ms, p99: 0.5391s, p50_low: 120ms, p50_high: 400ms}
  tpot: {p50: 27.7ms, p99: 32ms}
  error: 0.25
  source: roofline
"""


def test_a_prediction_comes_back_as_it_was() -> None:
    spec = parse_fleet(MINIMAL + PREDICTED)
    assert spec.predicted is not None
    assert spec.predicted.ttft is not None
    assert (spec.predicted.ttft.p99, spec.predicted.ttft.p99_low) == (539.1, None)
    assert parse_fleet(dump_fleet(spec)) == spec
    assert parse_fleet(MINIMAL).predicted is None


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("p99: 32ms", "p99: 32", "predicted.tpot.p99: not a duration with a unit"),
        ("p99: 32ms", "p99: 20ms", "predicted.tpot: p50 27.7ms is above p99 20ms"),
        ("p50_low: 120ms", "p50_low: 200ms", "predicted.ttft: p50_low 200ms is above p50 174ms"),
        ("rate: 13.5", "rate: 0", "predicted.rate"),
        ("error: 0.25", "error: 1", "predicted.error"),
        ("source:", "sources:", "predicted.sources: unknown key (did you mean 'source'?)"),
    ],
)
def test_a_prediction_that_cannot_be_is_refused(old: str, new: str, says: str) -> None:
    with pytest.raises(FleetFileError) as caught:
        parse_fleet(MINIMAL + PREDICTED.replace(old, new))
    assert says in str(caught.value)
