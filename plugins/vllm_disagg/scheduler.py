"""Scheduler half: issues references as a producer, checks and claims them as a consumer.

Both directions live in one class because the direction is a property of the request: an instance may prefill for
one request and decode another without a restart.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from vllm_disagg.claims import Claims
from vllm_disagg.config import DisaggConfig
from vllm_disagg.exchange import PullPlan, PullReport, StepOrders, merge_reports
from vllm_disagg.fence import FENCE_KEY, OwnView, content_digest, remote_params
from vllm_disagg.lease_server import LeaseServer
from vllm_disagg.leases import LeaseBook
from vllm_disagg.pace import Pace
from vllm_disagg.spans import PullSpans
from vllm_disagg.stages import TIMES_KEY, Stages
from vllm_disagg.stats import SuiteKVStats
from vllm_suite.compat.nixl import NixlConnectorMetadata, NixlPullConnectorScheduler
from vllm_suite.handoff import VERSION, Handoff, Refusal, fleet_key
from vllm_suite.identity import identity
from vllm_suite.loop_thread import LoopThread, bind

logger = logging.getLogger("vllm.suite.disagg")

# How long the first look at an unanswered claim may wait for it. On one rack the answer takes a fifth of this; the
# alternative is a whole engine step.
FIRST_LOOK_S = 0.001

# Given up per step while the lease channel's thread may have something to say. Without it, a loop that releases the
# interpreter lock often and briefly starves that thread: it is woken each time and finds the lock taken again.
CHANNEL_YIELD_S = 0.0001

# kv_transfer_params of a plain prefill request; anything else a client sends with do_remote_decode is dropped.
_PREFILL_PARAMS = {"do_remote_decode": True, "do_remote_prefill": False}


class SuitePullScheduler(NixlPullConnectorScheduler):
    """vLLM's pull scheduler with fenced references, claims and deadlines."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any, config: DisaggConfig) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self.config = config
        self.stats = SuiteKVStats()
        self._stages = Stages(lambda: self.stats)
        self._spans = PullSpans()
        me = identity()
        rank = vllm_config.parallel_config.data_parallel_index
        self._producer = me.instance_id if rank == 0 else f"{me.instance_id}/{rank}"
        self._epoch = me.epoch
        self._key = fleet_key()
        self._view = OwnView(vllm_config, self._key)
        self._recompute = vllm_config.kv_transfer_config.kv_load_failure_policy == "recompute"
        self._check_side_channel_port()
        self._book = LeaseBook(self._producer, self._epoch, config.max_hold_s)
        self._pace = Pace(self._book)
        self._thread = LoopThread("suite-lease-channel")
        lease_host = config.lease_host or self.side_channel_host
        lease_port = config.lease_port + rank if config.lease_port else 0
        self._server = LeaseServer(self._book, self._thread, lease_host, lease_port, self._pace.event)
        self._lease_host = lease_host
        self._claims = Claims(config, self._thread, self._producer)
        per_rank = sum(tensor.size for tensor in kv_cache_config.kv_cache_tensors) // kv_cache_config.num_blocks
        self._block_bytes = per_rank * self.transfer_tp_size
        self._contents: dict[str, str] = {}
        self._refused: dict[str, Refusal] = {}
        self._to_fail: list[str] = []
        self._pulling: set[str] = set()
        self._reports: dict[str, PullReport] = {}
        self._reported_leases = 0
        logger.info(
            "disagg: instance %s epoch %s, leases at %s:%d, %s",
            self._producer, self._epoch, lease_host, self._server.port,
            "references are signed" if self._key else "references are not signed (no fleet key)",
        )  # fmt: skip

    def _check_side_channel_port(self) -> None:
        # vLLM's listener thread would die on a taken port while its starter waits for it for ever.
        bind(self.side_channel_host, self.side_channel_port, "NIXL side channel (VLLM_NIXL_SIDE_CHANNEL_PORT)").close()

    def shutdown(self) -> None:
        self._claims.close()
        self._thread.stop()
        super().shutdown()

    # --- arrival ---

    def on_new_request(self, request: Any) -> None:
        params = request.kv_transfer_params
        if not params:
            return
        if params.get("do_remote_decode") is True:
            # Only these two decide what a prefill does. Upstream would pull unchecked blocks for the remote_* fields.
            params.clear()
            params.update(_PREFILL_PARAMS)
            self._contents[request.request_id] = content_digest(request)
            self._stages.arrived(request.request_id)
            super().on_new_request(request)
        elif params.get("do_remote_prefill") is True:
            self._check_reference(request, params)
        else:
            params.clear()

    def _check_reference(self, request: Any, params: dict[str, Any]) -> None:
        tokens = self._get_remote_prefill_token_count(request.num_prompt_tokens)
        ref = self._view.check(params, content_digest(request), tokens)
        if isinstance(ref, Refusal):
            self._refuse(request, ref)
            return
        # Upstream renews leases through the workers; here the claim does, and a dead peer costs the workers nothing.
        super().on_new_request(request)
        self._stop_heartbeat(request.request_id)
        self._claims.start(request.request_id, ref)
        self._stages.arrived(request.request_id)

    def _refuse(self, request: Any, reason: Refusal) -> None:
        """Drop the reference: compute locally, or fail the request where the policy says so."""
        logger.warning("disagg: request %s: reference refused: %s", request.request_id, reason)
        self.stats.refused(reason.value, recomputed=self._recompute)
        self._refused[request.request_id] = reason
        request.kv_transfer_params.clear()
        if not self._recompute:
            request.kv_transfer_params["do_remote_prefill"] = True

    # --- scheduling ---

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """As upstream; ``(None, False)`` while the producer has not answered the claim."""
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_prefill"):
            return 0, False
        request_id = request.request_id
        if request_id not in self._refused:
            claim = self._claims.get(request_id)
            if claim is None:
                return 0, False
            if not claim.answered.is_set() and not claim.answered.wait(FIRST_LOOK_S):
                return None, False
            now = time.monotonic()
            if claim.refusal is None and claim.until - now < self.config.pull_timeout_s / 2:
                claim.refusal = Refusal.LEASE_LOST
            if claim.refusal is not None:
                self._claims.finish(request_id, pulled=False)
                self._refuse(request, claim.refusal)
                if self._recompute:
                    return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_prefill"):
            super().update_state_after_alloc(request, blocks, num_external_tokens)
            if params and params.get("do_remote_decode"):
                self._stages.begun(request.request_id)
            return
        request_id = request.request_id
        if num_external_tokens == 0:
            # Everything is cached here already; no worker needs to know.
            self._claims.finish(request_id, pulled=False)
            params["do_remote_prefill"] = False
        elif request_id in self._refused:
            self._to_fail.append(request_id)
            params["do_remote_prefill"] = False
        else:
            super().update_state_after_alloc(request, blocks, num_external_tokens)
            self._pulling.add(request_id)
            self._claims.begin(request_id)
            self._stages.begun(request_id)
            self._spans.begun(request_id, request.trace_headers)

    def build_connector_meta(self, scheduler_output: Any) -> NixlConnectorMetadata:
        if self._claims.talking or len(self._book):
            time.sleep(CHANNEL_YIELD_S)
        now = time.monotonic()
        self._book.expire(now)
        if scheduler_output.total_num_scheduled_tokens:
            self._pace.worked()
        meta = super().build_connector_meta(scheduler_output)
        orders = StepOrders(fail=self._to_fail, let_go=self._book.take_ended())
        self._to_fail = []
        for request_id in meta.reqs_to_recv:
            claim = self._claims.get(request_id)
            if claim is not None:
                budget = min(self.config.pull_timeout_s, claim.until - now)
                orders.pulls[request_id] = PullPlan(claim.ref.producer, budget)
        meta.suite_orders = orders
        return meta

    def update_connector_output(self, connector_output: Any) -> None:
        super().update_connector_output(connector_output)
        if (reports := connector_output.kv_connector_worker_meta) is not None:
            merge_reports(self._reports, reports.pulls)
        failed = connector_output.failed_recving or set()
        for request_id in connector_output.finished_recving or ():
            self._pulling.discard(request_id)
            if request_id in failed:
                self._stages.forget(request_id)
            else:
                self._stages.done(request_id, "transfer")
            self._claims.finish(request_id, pulled=request_id not in failed)
            report = self._reports.pop(request_id, None)
            peer, size, failure = (report.peer, report.size, report.failure) if report is not None else ("", 0, "")
            self._spans.ended(request_id, peer, size, (failure or "transfer_error") if request_id in failed else "")
            self.stats.pulled(report, failed=request_id in failed, recomputed=self._recompute)
        now = time.monotonic()
        for request_id in connector_output.finished_sending or ():
            if ended := self._book.freed(request_id, now):
                self.stats.lease_ended(ended, self._block_bytes)

    # --- end of a request ---

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        request_id = request.request_id
        content = self._contents.pop(request_id, None)
        self._refused.pop(request_id, None)
        params = request.kv_transfer_params
        if params and params.get("do_remote_prefill"):
            # Ended before it was scheduled. Upstream would send the workers to tell a peer that may be gone.
            params["do_remote_prefill"] = False
            self.stats.refused(Refusal.ABANDONED.value, recomputed=False)
        if request_id not in self._pulling:  # a pull under way keeps its claim until it ends
            self._claims.finish(request_id, pulled=False)
        delay_free, result = super().request_finished(request, block_ids)
        if result is not None and result.get("do_remote_prefill") and content is not None:
            if delay_free:
                self._issue(request_id, content, result)
                times = self._stages.done(request_id, "prefill")
                if times is not None:
                    result[TIMES_KEY] = times
            else:
                result = None  # nothing was kept, so there is nothing to refer to
        self._stages.forget(request_id)
        return delay_free, result

    def _issue(self, request_id: str, content: str, result: dict[str, Any]) -> None:
        remote = remote_params({**result, "remote_block_ids": [list(group) for group in result["remote_block_ids"]]})
        assert not isinstance(remote, Refusal), "vLLM returned transfer parameters of a shape this version has not"
        ref = Handoff(
            version=VERSION,
            producer=self._producer,
            epoch=self._epoch,
            request_id=request_id,
            content=content,
            model=self._view.model,
            layout=self._view.layout,
            tokens=remote.remote_num_tokens,
            location=remote.location(),
            claim_host=self._lease_host,
            claim_port=self._server.port,
            lease_s=self.config.lease_s,
        ).signed(self._key)
        self._book.issue(ref, time.monotonic(), sum(len(group) for group in remote.remote_block_ids))
        # The book decides when blocks are let go; the workers' own timer is only there for a scheduler that is gone.
        self._reqs_need_send[request_id] = time.perf_counter() + self.config.max_hold_s + 60.0
        result[FENCE_KEY] = ref.to_json()

    # --- stats and idling ---

    def take_stats(self) -> SuiteKVStats | None:
        """What happened since the last call, or None."""
        leases = len(self._book)
        if leases != self._reported_leases:
            self._reported_leases = leases
            self.stats.data["suite_leases"].append(leases)
        if self._server.bad_messages:
            self.stats.data["suite_faults"].extend(["bad_lease_message"] * self._server.bad_messages)
            self._server.bad_messages = 0
        return None if self.stats.is_empty() else self.stats.clone_and_reset()

    def set_wake(self, wake: Callable[[], None]) -> None:
        self._pace.wake = wake

    def idle_wait_s(self, unfinished: bool) -> float:
        """See :class:`vllm_suite.compat.engine_idle.IdleAware`. Called when a step had nothing to execute."""
        return self._pace.wait_s(unfinished or bool(self._pulling))
