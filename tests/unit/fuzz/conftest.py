"""The log that fuzz tests look into."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator

import pytest
from fuzz_checks import Log


@pytest.fixture
def log() -> Iterator[Log]:
    handler = Log()
    logging.getLogger().addHandler(handler)
    # Each example collects garbage; what vLLM brings with it need not be walked each time.
    gc.collect()
    gc.freeze()
    yield handler
    gc.unfreeze()
    logging.getLogger().removeHandler(handler)
