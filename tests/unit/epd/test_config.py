"""Settings: their defaults, what the environment adds, and a clear word for each that cannot work."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from vllm_epd.config import MAX_BLOCKS, ConfigError, EpdConfig
from vllm_suite.encoded import MAX_MESSAGE_BYTES, Granted
from vllm_suite.frames import frame


def read(env: dict[str, str] | None = None, **suite: object) -> EpdConfig:
    return EpdConfig.from_extra_config({"suite": suite}, env or {})


def test_nothing_given() -> None:
    config = EpdConfig.from_extra_config({}, {})
    assert config == read()
    assert (config.pool_bytes, config.host_pool_bytes, config.block_bytes) == (268435456, 0, 65536)
    assert (config.receive_bytes, config.on_failure) == (134217728, "encode")
    assert (config.lease_s, config.hold_s, config.connect_timeout_s, config.claim_timeout_s) == (30, 5, 0.5, 1)
    assert (config.read_timeout_s, config.fetch_timeout_s, config.pending_timeout_s) == (5, 6, 60)
    assert (config.peer_retry_s, config.peer_retry_max_s) == (1, 30)
    assert config.verify_finite
    assert config.verify_checksum
    assert config.progress_delay_us is None
    assert config.address() == ("127.0.0.1", 0)


def test_null_stands_for_nothing() -> None:
    assert EpdConfig.from_extra_config({"suite": None}, {}) == read()
    assert read({"VLLM_HOST_IP": "10.0.0.9"}, host=None).host == "10.0.0.9"


@pytest.mark.parametrize(
    ("env", "host"),
    [
        ({"VLLM_HOST_IP": "10.0.0.3"}, "10.0.0.3"),
        ({"VLLM_HOST_IP": "10.0.0.3", "VLLM_NIXL_SIDE_CHANNEL_HOST": "10.0.0.2"}, "10.0.0.2"),
        (
            {
                "VLLM_HOST_IP": "10.0.0.3",
                "VLLM_NIXL_SIDE_CHANNEL_HOST": "10.0.0.2",
                "VLLM_EC_SIDE_CHANNEL_HOST": "10.0.0.1",
            },
            "10.0.0.1",
        ),
        ({"VLLM_EC_SIDE_CHANNEL_HOST": "", "VLLM_HOST_IP": "node-7.example"}, "node-7.example"),
    ],
)
def test_the_address_comes_from_vllms_variables(env: dict[str, str], host: str) -> None:
    assert read(env).address() == (host, 0)
    assert read(env, host="192.0.2.1").address() == ("192.0.2.1", 0)


def test_each_data_parallel_engine_has_a_port_of_its_own() -> None:
    env = {"VLLM_EC_SIDE_CHANNEL_PORT": "5601"}
    assert [read(env).address(index)[1] for index in range(3)] == [5601, 5602, 5603]
    assert read(env, port=7000).address(1)[1] == 7001
    assert read(env, port=0).address(5)[1] == 0, "a free one for each"
    with pytest.raises(ConfigError, match="65536"):
        read(port=65535).address(1)


def test_the_environment_is_the_processs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_EC_SIDE_CHANNEL_HOST", "192.0.2.7")
    monkeypatch.setenv("VLLM_EC_SIDE_CHANNEL_PORT", "5700")
    assert EpdConfig.from_extra_config({}).address() == ("192.0.2.7", 5700)


@pytest.mark.parametrize(
    ("suite", "named"),
    [
        ({"pool_byte": 1}, r"suite\.pool_byte"),
        ({"pool_bytes": 0}, r"suite\.pool_bytes"),
        ({"pool_bytes": "many"}, r"suite\.pool_bytes"),
        ({"pool_bytes": 65535}, "pool_bytes is smaller than block_bytes"),
        ({"host_pool_bytes": 100}, "host_pool_bytes is smaller than block_bytes"),
        ({"host_pool_bytes": -1}, r"suite\.host_pool_bytes"),
        ({"block_bytes": 100}, r"suite\.block_bytes"),
        ({"pool_bytes": 8 << 30}, "raise block_bytes to at least 262144"),
        ({"host_pool_bytes": 64 << 30}, "raise block_bytes to at least 2097152"),
        ({"receive_bytes": 0}, r"suite\.receive_bytes"),
        ({"lease_s": 0}, r"suite\.lease_s"),
        ({"hold_s": -1}, r"suite\.hold_s"),
        ({"read_timeout_s": 9}, "read_timeout_s must not exceed hold_s"),
        ({"claim_timeout_s": 6}, "claim_timeout_s must be shorter than fetch_timeout_s"),
        ({"peer_retry_s": 31}, "peer_retry_s must not exceed peer_retry_max_s"),
        ({"on_failure": "ignore"}, r"suite\.on_failure"),
        ({"host": ""}, "empty address"),
        ({"host": "0.0.0.0"}, "cannot connect"),
        ({"host": "::"}, "cannot connect"),
        ({"port": 65536}, r"suite\.port"),
        ({"port": -1}, r"suite\.port"),
        ({"progress_delay_us": -1}, r"suite\.progress_delay_us"),
        ({"lease_s": float("nan")}, r"suite\.lease_s"),
        ({"lease_s": float("inf")}, r"suite\.lease_s"),
    ],
)
def test_bad_settings_are_named(suite: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read(**suite)


@pytest.mark.parametrize("extra", [{"pool_bytes": 1}, {"suite": {}, "typo": 1}])
def test_keys_outside_the_suites_object_are_named(extra: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        EpdConfig.from_extra_config(extra, {})


@pytest.mark.parametrize("suite", [[], "pool_bytes=1", 5])
def test_settings_that_are_no_object(suite: object) -> None:
    with pytest.raises(ConfigError, match="must be an object"):
        EpdConfig.from_extra_config({"suite": suite}, {})


def test_a_bad_variable_is_named() -> None:
    with pytest.raises(ConfigError, match=r"suite\.port"):
        read({"VLLM_EC_SIDE_CHANNEL_PORT": "many"})


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        read().pool_bytes = 1  # type: ignore[misc]


def test_the_most_scattered_item_fits_one_message() -> None:
    runs = tuple(((1 << 63) + at * (1 << 32), 1 << 32) for at in range(MAX_BLOCKS // 2))
    granted = Granted(
        1, 1 << 62, 1 << 31, 1 << 31, "bfloat16", 1 << 40, (1 << 63) - 1, b"x" * 16, runs, "VRAM", 7, 60.0
    )
    assert len(frame(granted)) < MAX_MESSAGE_BYTES
