"""The router's question to a real item server: which items are kept, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.unit.epd.producers import FACTS, KEY, LocalProducer, picture
from vllm_suite.encoded import MAX_KEYS
from vllm_suite.handoff import Handoff
from vllm_suite.router.encode.encoded_client import EncodedClient, Keeper, ProbeFailed

SOON_S = 30.0


@pytest.fixture
def producer() -> Iterator[LocalProducer]:
    made = LocalProducer()
    yield made
    made.close()


def keeper(producer: LocalProducer, epoch: str = FACTS.epoch) -> Keeper:
    return Keeper(FACTS.producer, epoch, "127.0.0.1", producer.server.port)


async def test_the_router_learns_what_is_kept(producer: LocalProducer) -> None:
    issued = producer.put("s-one", picture(rows=16))
    producer.put("s-two", picture(rows=8, seed=1))
    client = EncodedClient(KEY)
    refs = await client.kept(keeper(producer), ["s-one", "s-none", "s-two"], 20.0, SOON_S)
    assert {name: ref.tokens for name, ref in refs.items()} == {"s-one": 16, "s-two": 8}
    assert isinstance(refs["s-one"], Handoff)
    assert refs["s-one"].check_signature(KEY) is None
    assert refs["s-one"].request_id == issued.request_id
    many = [f"s-{number}" for number in range(MAX_KEYS)]
    assert set(await client.kept(keeper(producer), [*many, "s-one"], 20.0, SOON_S)) == {"s-one"}
    client.close()


async def test_a_wrong_key_or_life_learns_nothing(producer: LocalProducer) -> None:
    producer.put("s-one")
    for client, where in ((EncodedClient(b"other"), keeper(producer)), (EncodedClient(KEY), keeper(producer, "old"))):
        with pytest.raises(ProbeFailed) as caught:
            await client.kept(where, ["s-one"], 20.0, SOON_S)
        assert caught.value.reason == "protocol"
        client.close()


async def test_an_idle_connection_is_opened_anew() -> None:
    producer = LocalProducer(idle_s=0.2)
    try:
        producer.put("s-one")
        client = EncodedClient(KEY)
        assert await client.kept(keeper(producer), ["s-one"], 20.0, SOON_S)
        async with asyncio.timeout(SOON_S):
            while producer.server.connections:
                await asyncio.sleep(0.01)
        assert await client.kept(keeper(producer), ["s-one"], 20.0, SOON_S)
        client.close()
    finally:
        producer.close()
