"""A fleet as a user starts it: ``vllm-suite up`` with one prefill, one decode and the router."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from harness import Fleet, running, spec

from vllm_suite.fleet.tiny import make_tiny_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.fleet)
            if missing:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed; run `make setup`"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def fleet_process(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    folder = tmp_path_factory.mktemp("fleet")
    with running(folder, spec(model, folder / "logs")) as process:
        yield process, folder / "logs"


@pytest.fixture
async def fleet(fleet_process: tuple[Any, Path]) -> AsyncIterator[Fleet]:
    process, log_dir = fleet_process
    async with aiohttp.ClientSession() as session:
        fleet = Fleet(process, log_dir, session)
        await fleet.ready("prefill")
        await fleet.ready("decode")
        yield fleet
        await fleet.ready("prefill")
        await fleet.ready("decode")
        await fleet.idle()
