"""vLLM's scheduler with its order, its victims and some of its ends decided by a policy.

What depends on vLLM's private names is here; what to decide is asked from a `LengthPolicy`. Bodies of vLLM's methods
run as they are: the waiting queue is another one, the running list is sorted before a step that may evict, and the
policy is told when requests come, start, give way and end.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from vllm_suite.compat.encode_only import asks_to_encode_only
from vllm_suite.compat.length_policy import End, LengthPolicy, PolicyFactory

_ENDS: dict[Any, End] = {
    RequestStatus.FINISHED_STOPPED: "stop",
    RequestStatus.FINISHED_LENGTH_CAPPED: "length",
    RequestStatus.FINISHED_REPETITION: "repetition",
    RequestStatus.FINISHED_ABORTED: "abort",
}


class LengthAwareScheduler(Scheduler):
    """vLLM's scheduler under a `LengthPolicy`. Every method calls super(), so other mix-ins go beside it.

    vLLM's own policy is set to first come, first served inside, where a queue's order is all that counts; the user's
    ``--scheduling-policy priority`` stays in the configuration and is part of the queue's order.
    """

    max_num_active_reqs: int

    def __init__(self, *args: Any, length_policy: PolicyFactory, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.length_policy: LengthPolicy = length_policy(self.vllm_config)
        self._scheduling = False
        self._stopping: dict[str, tuple[Any, Any]] = {}
        specs = [group.kv_cache_spec for group in self.kv_cache_config.kv_cache_groups]
        self._smallest_block = min((spec.block_size for spec in specs), default=self.block_size)
        self._kv_groups = len(specs)
        self._watermark = self.kv_cache_manager.watermark_blocks
        if self.length_policy.reorders:
            self.policy = SchedulingPolicy.FCFS
            self.waiting = self.length_policy.queue(RequestQueue)
            if self.connector is not None:  # requests whose KV has come wait there for a place
                self.kv_holding_waiting = self.length_policy.queue(RequestQueue)

    def add_request(self, request: Any) -> None:
        if request.request_id not in self.requests:
            self.length_policy.arrived(request, self._cached_tokens(request))
        super().add_request(request)

    def _update_request_as_session(self, session: Any, update: Any) -> None:
        super()._update_request_as_session(session, update)
        self.length_policy.renewed(session)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        policy = self.length_policy
        policy.begin_step()
        if policy.sorts_running and len(self.running) > 1 and self._may_evict():
            policy.sort_running(self.running)
        active = self.max_num_active_reqs
        # vLLM keeps it for requests that wait, and only while something runs.
        room = -(-policy.headroom // self._smallest_block) * self._kv_groups
        self.kv_cache_manager.watermark_blocks = max(self._watermark, room)
        if policy.gates and self.waiting:
            self.max_num_active_reqs = min(active, self._gated(policy))
        self._scheduling = True
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self._scheduling = False
            self.max_num_active_reqs = active
        if output.scheduled_new_reqs:
            policy.admitted([data.req_id for data in output.scheduled_new_reqs])
        if output.scheduled_cached_reqs.resumed_req_ids:
            policy.admitted(output.scheduled_cached_reqs.resumed_req_ids)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        outputs: dict[int, Any] = super().update_from_output(scheduler_output, model_runner_output)
        for request_id in self.length_policy.take_stops():
            request = self.requests.get(request_id)
            if request is not None and not request.is_finished():
                ended = self._end_with_what_it_has(request)
                outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(ended)
        return outputs

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        self.length_policy.evicted(request, "kv_full" if self._scheduling else "reset")
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        answers = super()._free_request(request, *args, **kwargs)
        self.length_policy.finished(request, _ENDS.get(request.status, "error"))
        if request.request_id in self._stopping:
            self._stopping[request.request_id] = answers
        return answers

    def shutdown(self) -> None:
        self.length_policy.close()
        super().shutdown()

    def _cached_tokens(self, request: Any) -> int:
        """Prompt tokens that need not be computed here, as far as can be told before it is this request's turn."""
        params = request.kv_transfer_params
        if asks_to_encode_only(request) or (isinstance(params, dict) and params.get("do_remote_prefill")):
            return int(request.num_prompt_tokens)
        manager = self.kv_cache_manager
        # With events on, a lookup may be published as reuse.
        if not self.length_policy.reorders or not request.block_hashes or manager.enable_kv_cache_events:
            return 0
        return int(manager.get_computed_blocks(request)[1])

    def _may_evict(self) -> bool:
        """Whether this step could run out of blocks before all running requests have theirs.

        Each begins one at most, or some more with speculation; while prompts are under way, all tokens of the step may
        fill others. Where that could be too many, those that are at the end of a block are counted.
        """
        running, size = self.running, self._smallest_block
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        ahead = self.num_lookahead_tokens + self.num_spec_tokens
        worst = (1 + -(-ahead // size)) * len(running)
        if self._inflight_prefills:
            worst += self.max_num_scheduled_tokens // size
        if free >= worst * self._kv_groups:
            return False
        if ahead or self._kv_groups > 1 or self._inflight_prefills:
            return True
        return bool(free < sum(not request.num_computed_tokens % size for request in running))

    def _gated(self, policy: LengthPolicy) -> int:
        """How many requests may run. Those that hold their KV already may always: it is there."""
        blocks = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
        capacity = blocks // max(self._kv_groups, 1) * self._smallest_block
        begin = policy.places(self.running, self.waiting, capacity)
        return len(self.running) + self.num_waiting_for_streaming_input + len(self.kv_holding_waiting) + begin

    def _end_with_what_it_has(self, request: Any) -> Any:
        request_id = request.request_id
        self._stopping[request_id] = (None, None)
        self.finish_requests(request_id, RequestStatus.FINISHED_LENGTH_CAPPED)
        kv_transfer_params, ec_transfer_params = self._stopping.pop(request_id)
        return EngineCoreOutput(
            request_id=request_id,
            new_token_ids=[],
            finish_reason=request.get_finished_reason(),
            events=request.take_events(),
            kv_transfer_params=kv_transfer_params,
            ec_transfer_params=ec_transfer_params,
            trace_headers=request.trace_headers,
        )
