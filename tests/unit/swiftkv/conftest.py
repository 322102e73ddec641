"""Tiny checkpoints shared by the tests of SwiftKV; each is made once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint(family, **options)`: the folder of a `tiny_checkpoint`. Read-only; copy it to change it."""
    pytest.importorskip("transformers")
    from tiny import tiny_checkpoint

    made: dict[str, Path] = {}

    def make(family: str, **options: Any) -> Path:
        key = f"{family} {sorted(options.items())}"
        if key not in made:
            made[key] = tiny_checkpoint(family, tmp_path_factory.mktemp("checkpoint") / family, **options)
        return made[key]

    return make


@pytest.fixture
def ram(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is room for it: fsync on a busy disk would be most of a test's time."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < 2 << 30:
        yield tmp_path_factory.mktemp("disk")
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)
