"""Producers and consumers of the item channel, each in this process and on a port of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

pytest.importorskip("torch")

from tests.unit.epd.producers import Consumer, LocalProducer


@pytest.fixture
def producer() -> Iterator[LocalProducer]:
    made = LocalProducer()
    yield made
    made.close()


@pytest.fixture
async def consumer(producer: LocalProducer) -> AsyncIterator[Consumer]:
    made = await Consumer.connect(producer.server.port)
    yield made
    made.close()
