"""A prefill and a decode engine shared by the tests that leave both healthy."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pair import SUITE, Pair
from pd import Spec, engines
from swiftkv_checkpoints import make_swiftkv_checkpoint

from vllm_suite.fleet.tiny import make_tiny_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.engine)
            if missing:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed; run `make setup`"))


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """Engines are forked from this process: a child of one that has used OpenMP threads waits for them for ever."""
    if importlib.util.find_spec("torch") is not None:
        importlib.import_module("torch").set_num_threads(1)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def shared_pair(model: Path) -> Iterator[Pair]:
    with engines(Spec("p", model, suite=SUITE), Spec("d", model, suite=SUITE)) as (p, d):
        yield Pair(p, d)


@pytest.fixture
def pair(shared_pair: Pair) -> Iterator[Pair]:
    """The shared engines; after the test no block of either may be missing."""
    yield shared_pair
    shared_pair.wait_free()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes SwiftKV checkpoints as `make_swiftkv_checkpoint` does, equal ones once."""
    made: dict[str, Path] = {}

    def make(family: str, **options: Any) -> Path:
        key = f"{family} {sorted(options.items())}"
        if key not in made:
            made[key] = make_swiftkv_checkpoint(tmp_path_factory.mktemp("swiftkv") / family, family, **options)
        return made[key]

    return make
