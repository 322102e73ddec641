"""The encoder pool with its slab on a real GPU: the same checksums as on a CPU, and no copy that is read too early."""

from __future__ import annotations

import time

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed here")

from vllm_epd.agent import Agent  # noqa: E402
from vllm_epd.checksum import checksum, finite  # noqa: E402
from vllm_epd.pool import Pool, Stored  # noqa: E402
from vllm_epd.tiers import new_slab  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
BLOCK = 65536


@pytest.mark.parametrize("size", [0, 1, 3, 4096, 4097, 1 << 20, (1 << 25) + 12345])
def test_the_checksum_is_the_same_on_both(size: int) -> None:
    data = torch.randint(0, 256, (size + 3,), dtype=torch.uint8)
    for offset in (0, 3):
        here = data[offset : offset + size]
        there = data.cuda()[offset : offset + size]
        assert checksum(here, 7) == checksum(there, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_value_that_is_not_finite_is_seen(dtype: torch.dtype) -> None:
    values = torch.randn(592, 3584, device="cuda").to(dtype)
    assert finite(values)
    for bad in (float("nan"), float("inf"), float("-inf")):
        spoiled = values.clone()
        spoiled[591, 3583] = bad
        assert not finite(spoiled)


@pytest.mark.parametrize("own_stream", [False, True])
def test_what_a_busy_stream_makes_is_stored_whole_and_moves_to_host_memory_and_back(own_stream: bool) -> None:
    pool = Pool(new_slab(64 * BLOCK, "cuda"), BLOCK, 30.0, host_slab=new_slab(256 * BLOCK, pinned=True))
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    made = []
    with torch.cuda.stream(stream):
        for at in range(4):
            torch.cuda._sleep(50_000_000)
            values = (torch.randn(592, 3584, device="cuda") * (at + 1)).to(torch.bfloat16)
            stored = pool.put(str(at), values)
            assert isinstance(stored, Stored), stored
            made.append(values.cpu())
            values.zero_()
    tiers = []
    for at, values in enumerate(made):
        found, loaded = pool.get(str(at)), pool.load(str(at))
        assert found is not None
        assert loaded is not None
        assert loaded.device.type == "cuda"
        assert torch.equal(loaded.cpu(), values)
        assert found.checksum == checksum(values, found.seed)
        assert found.memory == {"device": "VRAM", "host": "DRAM"}[found.tier]
        tiers.append(found.tier)
    assert tiers == ["host", "host", "host", "device"]


def test_nixl_reads_video_memory() -> None:
    slab, buffer = new_slab(128 * BLOCK, "cuda"), new_slab(128 * BLOCK, "cuda")
    pool = Pool(slab, BLOCK, 30.0)
    producer, consumer = Agent(f"gpu-producer-{time.monotonic_ns()}"), Agent(f"gpu-consumer-{time.monotonic_ns()}")
    producer.register(slab)
    consumer.register(buffer)
    stored = pool.put("a", torch.randn(592, 3584, device="cuda").to(torch.bfloat16))
    assert isinstance(stored, Stored)
    read = consumer.read(
        consumer.add_remote(producer.metadata()),
        [(buffer.data_ptr(), stored.size)],
        stored.addresses(),
        stored.memory,
        device=stored.device,
        local_memory="VRAM",
        local_device=buffer.device.index or 0,
    )
    deadline = time.monotonic() + 30
    while read.poll() == "reading":
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert read.state == "done", read.error
    assert checksum(buffer[: stored.size], stored.seed) == stored.checksum
    consumer.close()
    producer.close()
