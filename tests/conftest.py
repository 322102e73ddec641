"""How tests share the machine where pytest is given workers, as `make test` does (``-n 2 --dist loadfile``).

Most use one core, so workers run them side by side, a file at a time. What starts whole fleets, keeps deadlines or
measures times follows when the workers have ended, one after the other in pytest's own process; so one run has one
summary and one exit status. Without ``-n`` everything runs there.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

HERE = Path(__file__).parent
# Below this folder: these want the machine for themselves.
ALONE = (
    "fleet",
    "gpu",
    "engine/test_calibrate.py",
    "engine/test_control_endpoint.py",
    "engine/test_disagg_start.py",
    "engine/test_dler_pd.py",
    "engine/test_dler_serving.py",
    "engine/test_epd_encode_only.py",
    "engine/test_epd_faults.py",
    "engine/test_epd_idle.py",
    "engine/test_epd_overlap.py",
    "engine/test_epd_slices.py",
    "engine/test_epd_tower.py",
    "engine/test_epd_tp.py",
    "engine/test_epd_v2.py",
    "engine/test_handoff.py",
    "engine/test_layouts.py",
    "engine/test_slices_exact.py",
    "engine/test_swiftkv_eval.py",
    "engine/test_swiftkv_prefill_only.py",
    "engine/test_swiftkv_serving.py",
    "engine/test_swiftkv_tp.py",
    "engine/test_transfer_faults.py",
)
# What workers begin with: engines are forked from a process that has run nothing else, and a long file that is begun
# last leaves all workers but one without work.
FIRST = ("engine", "unit/swiftkv", "unit/dler", "unit/kernels")


# How long examples take says how busy the machine is. The rest stays as Hypothesis has it, in CI and elsewhere.
settings.register_profile(
    "untimed",
    parent=settings.get_profile(settings.get_current_profile_name()),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    if _is_worker(config):
        # Workers fill the cores; and an engine that is forked from a process which has used OpenMP threads hangs.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.suffix != ".py" or _runs_here(collection_path, config):
        return None  # other reasons to ignore it remain
    return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A file that was named on the command line is not asked for above."""
    items[:] = [item for item in items if _runs_here(item.path, config)]
    if _is_worker(config):
        items.sort(key=lambda item: next((i for i, name in enumerate(FIRST) if _below(item.path, name)), len(FIRST)))


@pytest.fixture(autouse=True)
def _root_log_level() -> Iterator[None]:
    """vLLM's API server imports a package that sets it to ERROR; which files a worker ran before must not matter."""
    level = logging.root.level
    yield
    logging.root.setLevel(level)


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, Any, Any]:
    done = yield
    if _has_workers(session.config):
        _run_the_rest(session)
    return done


def _run_the_rest(session: pytest.Session) -> None:
    by_workers = session.testscollected
    reporter: Any = session.config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None:
        reporter.showfspath = session.config.get_verbosity() >= 0  # xdist switched it off: its files are mixed
        reporter.write_line("")
    items = session.perform_collect()
    session.testscollected += by_workers
    for item, following in itertools.pairwise([*items, None]):
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _has_workers(config: pytest.Config) -> bool:
    return config.pluginmanager.hasplugin("dsession")


def _runs_here(path: Path, config: pytest.Config) -> bool:
    alone = any(_below(path, name) for name in ALONE)
    if _is_worker(config):
        return not alone
    return alone or not _has_workers(config)


def _below(path: Path, name: str) -> bool:
    return path.is_relative_to(HERE / name)
