"""Worker half: pulls with a deadline, and keeps every fault of a transfer from ending the engine.

A raise inside an engine step ends EngineCore. What belongs to one request is contained here, counted, and reported
as that request's failure; vLLM then recomputes or fails it, as ``kv_load_failure_policy`` says.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_disagg.config import DisaggConfig
from vllm_disagg.exchange import PullReport, StepOrders, WorkerReports
from vllm_disagg.leases import End
from vllm_disagg.stats import SuiteKVStats
from vllm_suite.compat.nixl import KVConnectorTransferResults, NixlPullConnectorWorker, quiet_progress_thread

logger = logging.getLogger("vllm.suite.disagg")

# Given up per step while a handshake is under way; up to ten times as much when it takes long.
HANDSHAKE_YIELD_S = 0.001

# Shapes of peers whose descriptor offsets are kept.
MAX_GEOMETRIES = 256

# "<request id>:<number of consumers>", or a heartbeat with comma-separated request ids.
_NOTICE = re.compile(rb"HB:[\x20-\x7e]*|[\x20-\x7e]+:[0-9]{1,6}")


@dataclass(slots=True)
class Pull:
    """One pull under way; times are this process's monotonic seconds."""

    peer: str
    started: float
    deadline: float
    blocks: int
    failed: str = ""


class SuitePullWorker(NixlPullConnectorWorker):
    """vLLM's pull worker with deadlines, quarantine of dead peers, and contained faults."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any, config: DisaggConfig) -> None:
        from vllm.platforms import current_platform

        on_cpu = current_platform.device_type == "cpu"
        delay_us = config.progress_delay_us
        if delay_us is None and on_cpu:
            delay_us = 10_000
        if delay_us:
            quiet_progress_thread(delay_us)
        cores = os.sched_getaffinity(0)
        super().__init__(vllm_config, engine_id, kv_cache_config)
        if on_cpu:
            # Upstream pins this thread, which runs the model, to the last core of each NUMA node.
            os.sched_setaffinity(0, cores)
        self.config = config
        self.xfer_stats = SuiteKVStats()
        self._reports: dict[str, PullReport] = {}
        self._pulls: dict[str, Pull] = {}
        self._orders = StepOrders()
        self._handshake_since = 0.0
        self._desc_offsets: dict[tuple[Any, ...], Any] = {}
        # Leases whose blocks this worker still holds for the scheduler.
        self._sending: set[str] = set()
        self._upstream_notifs = self.nixl_wrapper.get_new_notifs
        self.nixl_wrapper.get_new_notifs = self._wellformed_notifs

    # --- start of pulls ---

    def start_load_kv(self, metadata: Any) -> None:
        self._orders = getattr(metadata, "suite_orders", None) or StepOrders()
        self._sending.update(metadata.reqs_to_send)
        now = time.monotonic()
        for request_id, meta in metadata.reqs_to_recv.items():
            plan = self._orders.pulls.get(request_id)
            budget = plan.budget_s if plan is not None else self.config.pull_timeout_s
            blocks = sum(len(group) for group in meta.local_block_ids)
            self._pulls[request_id] = Pull(plan.peer if plan else "unknown", now, now + budget, blocks)
        super().start_load_kv(metadata)

    def _read_blocks_for_req(self, req_id: str, meta: Any) -> None:
        pull = self._pulls.get(req_id)
        if pull is None or pull.failed or self._recving_metadata.get(req_id) is not meta:
            return  # its deadline passed while the handshake ran; its blocks may belong to another request now
        if time.monotonic() >= pull.deadline:
            self._give_up(req_id, pull, "pull_timeout")
            return
        try:
            super()._read_blocks_for_req(req_id, meta)
        except Exception as error:  # noqa: BLE001  a raise here ends the engine; see the module's docstring
            self._contain(req_id, pull, "read_setup", error)

    def _nixl_handshake(self, host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        # Upstream asks over ZMQ, which cannot tell a closed port from a slow peer: 5 s for every dead producer, on
        # the one thread that makes all handshakes.
        with socket.create_connection((host, port), timeout=self.config.claim_timeout_s):
            pass
        return super()._nixl_handshake(host, port, *args, **kwargs)

    def _compute_desc_ids(self, block_ids: Any, *geometry: Any, **more_geometry: Any) -> Any:
        """Descriptor ids of ``block_ids``; upstream's answer, without deriving its offsets anew for each pull.

        With one KV cache group of attention a descriptor id is the block id plus an offset for each region, so
        upstream is asked once, for block 0. The calls were the largest part of a pull's time outside NIXL.
        """
        if len(block_ids) != 1 or self._has_mamba:
            return super()._compute_desc_ids(block_ids, *geometry, **more_geometry)
        values = (*geometry, *more_geometry, *more_geometry.values())
        key = tuple(tuple(value) if isinstance(value, list) else value for value in values)
        offsets = self._desc_offsets.get(key)
        if offsets is None:
            if len(self._desc_offsets) >= MAX_GEOMETRIES:
                self._desc_offsets.clear()
            offsets = super()._compute_desc_ids(([0],), *geometry, **more_geometry)[:, None]
            self._desc_offsets[key] = offsets
        return (offsets + np.array(block_ids[0], dtype=np.int32)).ravel()

    # --- end of pulls ---

    def get_transfer_results(self) -> KVConnectorTransferResults:
        now = time.monotonic()
        self._yield_to_handshake(now)
        for request_id, pull in self._pulls.items():
            if not pull.failed and now >= pull.deadline:
                self._give_up(request_id, pull, "pull_timeout")
        try:
            results = super().get_transfer_results()
        except Exception as error:
            logger.exception("disagg: polling transfers failed; trying again in the next step")
            self.xfer_stats.data["suite_faults"].append(f"poll_{type(error).__name__}")
            results = KVConnectorTransferResults(set(), set(), set())
        self._sending -= results.finished_sending
        for request_id, pull in self._pulls.items():
            if pull.failed and request_id not in self._recving_metadata:
                # An earlier poll raised after it had taken this pull off upstream's books; nobody else reports it.
                results.finished_recving.add(request_id)
                results.failed_recving.add(request_id)
        for request_id in results.finished_recving:
            self._account(request_id, request_id in results.failed_recving, now)
        for request_id in self._orders.fail:
            results.finished_recving.add(request_id)
            results.failed_recving.add(request_id)
        for request_id, end in self._orders.let_go.items():
            self._let_go(request_id, end, results)
        self._orders = StepOrders()
        return results

    def _yield_to_handshake(self, now: float) -> None:
        """Leave the interpreter to a handshake under way, which runs in a thread of this process.

        An engine loop that releases the interpreter lock often and briefly starves it for seconds: the thread is
        woken each time and finds the lock taken again. It happens once per peer, for some tens of steps.
        """
        if not self._handshake_futures:
            self._handshake_since = 0.0
            return
        self._handshake_since = self._handshake_since or now
        time.sleep(min(HANDSHAKE_YIELD_S * (1 + 50 * (now - self._handshake_since)), 10 * HANDSHAKE_YIELD_S))

    def get_block_ids_with_load_errors(self) -> set[int]:
        # Failures are reported by request. Reported by block as well, they end an engine with several KV groups.
        super().get_block_ids_with_load_errors()
        return set()

    def _give_up(self, request_id: str, pull: Pull, why: str) -> None:
        """Fail a pull. Its local blocks stay untouched until NIXL has let go of every handle."""
        pull.failed = why
        logger.warning(
            "disagg: request %s: %s after %.1f s from %s",
            request_id,
            why,
            time.monotonic() - pull.started,
            pull.peer,
        )
        for handle in self._recving_transfers.pop(request_id, []):
            if not self._try_release_xfer_handle(request_id, handle):
                self._force_release(request_id, handle)
        self._recv_failures.add(request_id)

    def _force_release(self, request_id: str, handle: int) -> None:
        """Close the connection to the peer, so that nothing can write into the blocks any more, and let go.

        Other pulls from that peer fail with it and are recomputed; the next reference makes a new connection.
        """
        meta = self._recving_metadata.get(request_id)
        self.xfer_stats.data["suite_faults"].append("forced_release")
        if meta is not None and meta.remote is not None and meta.remote.engine_id in self._remote_agents:
            self._cleanup_remote_engine(meta.remote.engine_id)
        self._try_release_xfer_handle(request_id, handle)

    def _contain(self, request_id: str, pull: Pull, where: str, error: Exception) -> None:
        logger.error("disagg: request %s: %s failed: %r", request_id, where, error)
        self.xfer_stats.data["suite_faults"].append(f"{where}_{type(error).__name__}")
        self._give_up(request_id, pull, where)

    def _account(self, request_id: str, failed: bool, now: float) -> None:
        pull = self._pulls.pop(request_id, None)
        if pull is None:
            return
        failure = (pull.failed or "transfer_error") if failed else ""
        blocks = 0 if failed else pull.blocks
        size = blocks * self._physical_blocks_per_logical_kv_block * sum(self.block_len_per_layer)
        self._reports[request_id] = PullReport(pull.peer, failure, size, blocks, now - pull.started)

    def take_reports(self) -> WorkerReports | None:
        """Pulls that ended since the last call, or None."""
        reports, self._reports = self._reports, {}
        return WorkerReports(reports) if reports else None

    def _wellformed_notifs(self, *args: Any, **kwargs: Any) -> dict[str, list[bytes]]:
        """NIXL's notices without those that are none of vLLM's, which upstream would raise on."""
        notifs: dict[str, list[bytes]] = self._upstream_notifs(*args, **kwargs)
        for agent, messages in notifs.items():
            good = [message for message in messages if _NOTICE.fullmatch(message)]
            if len(good) != len(messages):
                self.xfer_stats.data["suite_faults"].extend(["bad_notice"] * (len(messages) - len(good)))
                notifs[agent] = good
        return notifs

    def _let_go(self, request_id: str, end: End, results: KVConnectorTransferResults) -> None:
        """Give back the blocks of a lease that ended without a pull, unless a pull has just ended it."""
        if request_id not in self._sending:
            return
        self._sending.discard(request_id)
        self._reqs_to_send.pop(request_id, None)
        self._reqs_to_process.discard(request_id)
        self.consumer_notification_counts_by_req.pop(request_id, None)
        self.expected_consumer_notifications_by_req.pop(request_id, None)
        results.finished_sending.add(request_id)
        if end is End.EXPIRED:
            self.xfer_stats.record_kv_expired_req()
            logger.warning("disagg: lease of %s expired; its blocks are free", request_id)
