"""A fleet as a user starts it: ``vllm-suite up`` with one prefill, one decode and the router."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import AsyncIterator, Generator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from harness import TARGETS, Fleet, running, spec

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


class Shared:
    """The fleet that several modules use: started for the first test that wants it, ended after the last in a row."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._found: tuple[Any, Path] | BaseException | None = None

    def get(self, folder: Path, model: Path) -> tuple[Any, Path]:
        """Its process and its folder of logs. A fleet that did not start is not tried again."""
        if self._found is None:
            try:
                fleet = spec(model, folder / "logs") | TARGETS
                self._found = self._stack.enter_context(running(folder, fleet)), folder / "logs"
            except BaseException as error:
                self._found = error
                raise
        if isinstance(self._found, BaseException):
            raise RuntimeError("the fleet did not start") from self._found
        return self._found

    def close(self) -> None:
        if not isinstance(self._found, BaseException):
            self._found = None
        self._stack.close()


SHARED = Shared()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> Generator[None, Any, Any]:
    try:
        return (yield)
    finally:
        if nextitem is None or "shared_fleet" not in getattr(nextitem, "fixturenames", ()):
            SHARED.close()


@pytest.fixture
def shared_fleet(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return SHARED.get(tmp_path_factory.mktemp("fleet"), model)


@pytest.fixture
async def fleet(shared_fleet: tuple[Any, Path]) -> AsyncIterator[Fleet]:
    process, log_dir = shared_fleet
    async with aiohttp.ClientSession() as session:
        fleet = Fleet(process, log_dir, session)
        await fleet.ready("prefill")
        await fleet.ready("decode")
        yield fleet
        await fleet.ready("prefill")
        await fleet.ready("decode")
        await fleet.idle()
