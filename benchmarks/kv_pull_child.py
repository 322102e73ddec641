"""The parts of ``bench_kv_pull.py`` that run inside the prefill and the decode process."""

from __future__ import annotations

import ctypes
import itertools
import os
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from kv_memory import Iovec, checksum, fill, iovecs, layout, regions, worker

DEADLINE_S = 30.0
IOV_MAX = 1024
NOTICE = b"bench:1"


@dataclass(frozen=True)
class Peer:
    """Where the decode process reads from.

    Attributes:
        params: ``kv_transfer_params`` of a genuine prefill.
        layout: one row per descriptor: address, length, device; as the prefill worker registered them.
        agent: metadata of a second NIXL agent with its progress thread as NIXL ships it, or None.
    """

    params: dict[str, Any]
    layout: np.ndarray[Any, Any]
    pid: int
    agent: bytes | None = None


@dataclass(frozen=True)
class Case:
    """One size and block order."""

    blocks: int
    order: str  # "contiguous" or "scattered"


_kept: list[Any] = []


def open_shipped_agent(llm: Any) -> bytes:
    """A second agent over the same memory, configured as vLLM does it, its thread spinning as NIXL ships it."""
    from nixl._api import nixl_agent, nixl_agent_config

    from vllm_suite.compat.nixl import quiet_progress_thread

    quiet_progress_thread(0)
    agent = nixl_agent(f"bench-{os.getpid()}", nixl_agent_config(num_threads=4, capture_telemetry=True))
    rows = layout(llm)
    spans = [(int(row[0]), int(row[1]), 0, "") for row in regions(rows)]
    agent.register_memory(agent.get_reg_descs(spans, "DRAM"), backends=["UCX"])
    _kept.append(agent)
    metadata: bytes = agent.get_agent_metadata()
    return metadata


class Puller:
    """The ways to bring the same blocks into the decode process."""

    def __init__(self, llm: Any, peer: Peer, seed: int) -> None:
        from vllm_suite.compat.nixl import NixlPullConnectorWorker

        self.half, self.peer, self.llm = worker(llm), peer, llm
        self.upstream = NixlPullConnectorWorker
        self.ids = itertools.count()
        self.rows = layout(llm)
        self.blocks_per_region = int(self.half.num_blocks)
        self.rng = np.random.default_rng(seed)
        engine = peer.params["remote_engine_id"]
        self.local_handle = self.half.src_xfer_handles_by_block_size[self.half.block_size]
        self.remote_handle = self.half.dst_xfer_side_handles[engine][0]
        self.agent = self.half.nixl_wrapper
        largest = int(self.rows[0, 1]) * len(self.rows)
        self.source, self.target = np.ones(largest, np.uint8), np.ones(largest, np.uint8)
        self.readv = ctypes.CDLL(None, use_errno=True).process_vm_readv
        self.readv.restype = ctypes.c_ssize_t
        self.shipped: tuple[Any, Any, Any] | None = None

    def open_shipped(self) -> None:
        open_shipped_agent(self.llm)
        agent = _kept[-1]
        name = agent.add_remote_agent(self.peer.agent)
        local = agent.prep_xfer_dlist("NIXL_INIT_AGENT", agent.get_xfer_descs(self.rows, "DRAM"))
        remote = agent.prep_xfer_dlist(name, agent.get_xfer_descs(self.peer.layout, "DRAM"))
        self.shipped = (agent, local, remote)

    def prepare(self, case: Case) -> Prepared:
        usable = np.arange(1, self.blocks_per_region)
        if case.order == "scattered":
            local, remote = (self.rng.permutation(usable)[: case.blocks] for _ in range(2))
        else:
            local = remote = usable[: case.blocks]
        regions = np.arange(len(self.rows) // self.blocks_per_region)[:, None] * self.blocks_per_region
        local_descs = (regions + local[None, :]).ravel().astype(np.int32)
        remote_descs = (regions + remote[None, :]).ravel().astype(np.int32)
        return Prepared(
            case,
            local.tolist(),
            remote.tolist(),
            local_descs,
            remote_descs,
            int(self.rows[local_descs, 1].sum()),
            iovecs(self.rows[local_descs]),
            iovecs(self.peer.layout[remote_descs]),
        )

    # Each returns the seconds it took.

    def ours(self, prepared: Prepared) -> float:
        """Our worker, from the order of the scheduler to the report that the request's KV is here."""
        return self._worker_pull(prepared, self.half.start_load_kv, self.half.get_transfer_results)

    def stock(self, prepared: Prepared) -> float:
        """The same worker with every override of ours bypassed: vLLM's own code on the same agent."""
        self.half._read_blocks_for_req = types.MethodType(self.upstream._read_blocks_for_req, self.half)
        try:
            return self._worker_pull(
                prepared,
                types.MethodType(self.upstream.start_load_kv, self.half),
                types.MethodType(self.upstream.get_transfer_results, self.half),
            )
        finally:
            del self.half._read_blocks_for_req

    def _worker_pull(self, prepared: Prepared, start: Callable[[Any], None], poll: Callable[[], Any]) -> float:
        from vllm_disagg.scheduler import PullPlan, StepOrders
        from vllm_suite.compat.nixl import NixlConnectorMetadata

        name = f"bench-{next(self.ids)}"
        params = {**self.peer.params, "remote_request_id": "bench", "remote_block_ids": [prepared.remote]}
        metadata = NixlConnectorMetadata()
        metadata.add_new_req_to_recv(name, ([*prepared.local],), params, awaiting_kvs=True)
        metadata.suite_orders = StepOrders(pulls={name: PullPlan("p", DEADLINE_S)})
        end = time.perf_counter() + DEADLINE_S
        begun = time.perf_counter()
        start(metadata)
        while True:
            results = poll()
            if name in results.finished_recving:
                break
            if time.perf_counter() > end:
                raise TimeoutError(f"{name} did not arrive in {DEADLINE_S:.0f} s")
        seconds = time.perf_counter() - begun
        if results.failed_recving:
            raise RuntimeError(f"{name} failed")
        self.half._pulls.pop(name, None)
        return seconds

    def raw(self, prepared: Prepared) -> float:
        """NIXL alone: same agent, same prepared descriptor lists, same notice."""
        return _raw_read(self.agent, self.local_handle, self.remote_handle, prepared)

    def raw_shipped(self, prepared: Prepared) -> float:
        """NIXL alone with an agent of its own, whose progress thread spins."""
        assert self.shipped is not None
        return _raw_read(*self.shipped, prepared)

    def vm_readv(self, prepared: Prepared) -> float:
        """The system call below UCX's CMA transport, over the same blocks."""
        begun = time.perf_counter()
        moved = 0
        for first in range(0, len(prepared.local_iov), IOV_MAX):
            count = min(IOV_MAX, len(prepared.local_iov) - first)
            offset = first * ctypes.sizeof(Iovec)
            moved += self.readv(
                self.peer.pid,
                ctypes.byref(prepared.local_iov, offset),
                ctypes.c_ulong(count),
                ctypes.byref(prepared.remote_iov, offset),
                ctypes.c_ulong(count),
                ctypes.c_ulong(0),
            )
        seconds = time.perf_counter() - begun
        if moved != prepared.size:
            raise OSError(ctypes.get_errno(), f"process_vm_readv moved {moved} of {prepared.size} bytes")
        return seconds

    def copy(self, prepared: Prepared) -> float:
        """numpy, one contiguous piece, inside this process."""
        begun = time.perf_counter()
        np.copyto(self.target[: prepared.size], self.source[: prepared.size])
        return time.perf_counter() - begun


@dataclass(frozen=True)
class Prepared:
    """A case with everything computed that no method should be timed for."""

    case: Case
    local: list[int]
    remote: list[int]
    local_descs: np.ndarray[Any, Any]
    remote_descs: np.ndarray[Any, Any]
    size: int
    local_iov: Any
    remote_iov: Any


def _raw_read(agent: Any, local: Any, remote: Any, prepared: Prepared) -> float:
    end = time.perf_counter() + DEADLINE_S
    begun = time.perf_counter()
    handle = agent.make_prepped_xfer(
        "READ", local, prepared.local_descs, remote, prepared.remote_descs, notif_msg=NOTICE
    )
    agent.transfer(handle)
    while (state := agent.check_xfer_state(handle)) == "PROC":
        if time.perf_counter() > end:
            raise TimeoutError(f"raw NIXL took longer than {DEADLINE_S:.0f} s")
    agent.release_xfer_handle(handle)
    seconds = time.perf_counter() - begun
    if state != "DONE":
        raise RuntimeError(f"raw NIXL ended as {state}")
    return seconds


def measure(
    llm: Any, peer: Peer, cases: list[Case], methods: list[str], rounds: int, inner_bytes: int, seed: int
) -> list[tuple[Case, int, str, list[list[float]]]]:
    """Seconds per case and method, one list per round.

    Within a round every method of a case runs in turn, in random order, so that whatever else the machine does, and
    what the method before left in the caches, falls on all of them.

    Args:
        inner_bytes: a round repeats a small case until about this many bytes were moved, at most 20 times.
    """
    puller = Puller(llm, peer, seed)
    if "raw_shipped" in methods:
        puller.open_shipped()
    prepared = [puller.prepare(case) for case in cases]
    samples: dict[tuple[int, str], list[list[float]]] = {(i, m): [] for i in range(len(cases)) for m in methods}
    for turn in range(rounds + 1):
        for index, one in enumerate(prepared):
            inner = max(1, min(20, inner_bytes // one.size))
            taken: dict[str, list[float]] = {method: [] for method in methods}
            for _ in range(inner):
                for method in puller.rng.permutation(methods):
                    taken[method].append(getattr(puller, method)(one))
            if turn:  # the first round warms up
                for method in methods:
                    samples[index, method].append(taken[method])
        if len(puller.half.xfer_stats.data["suite_pulls"]) > 1000:
            puller.half.xfer_stats.reset()
    return [(one.case, one.size, m, samples[i, m]) for i, one in enumerate(prepared) for m in methods]


def check(llm: Any, peer: Peer, case: Case, method: str, seed: int) -> tuple[np.ndarray[Any, Any], int]:
    """Pull once into zeroed blocks. Returns the prefill side's descriptors and the checksum of what came."""
    puller = Puller(llm, peer, seed)
    one = puller.prepare(case)
    fill(llm, None)
    getattr(puller, method)(one)
    return one.remote_descs, checksum(llm, one.local_descs)
