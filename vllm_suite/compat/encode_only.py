"""Requests that only encode, on an instance that has the whole model.

A request whose ``ec_transfer_params`` has ``"suite_encode_only": true`` wants its encoder outputs stored by the EC
connector and nothing generated. vLLM encodes an item when the language model is about to reach it, so the prompt
would be prefilled for nothing. Here all items are scheduled as far as the encoder's budgets allow, one token of the
language model goes along (a step without tokens is no step in vLLM), and the request ends when its last item has
been encoded, with the connector's answer.

The token of a step must not be one whose encoder output is missing, which would end the worker. After ``k`` steps at
least ``k`` items are encoded and the next token is number ``k`` or lower, so it lies in none of the items to come;
what it may still lie in stays referenced in vLLM's encoder cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

ENCODE_ONLY_KEY = "suite_encode_only"

Granted = tuple[list[int], int, int, list[int], list[int]]
"""What vLLM's scheduler gets for one request and step: items to encode, tokens to compute, encoder budget that is
left, items to load from the connector, items that another item of this step is equal to."""


@dataclass
class Progress:
    """How far an encode-only request is.

    ``done`` items, counted from the first, are encoded by steps that were scheduled; ``planned`` is what ``done``
    becomes if the attempt under way is scheduled. ``in_flight`` steps have been scheduled and not been reported.
    """

    done: int = 0
    planned: int = 0
    in_flight: int = 0
    answers: tuple[Any, Any] = (None, None)


def asks_to_encode_only(request: Any) -> bool:
    """Whether a request carries the mark. Anything but a plain ``true`` is somebody else's."""
    params = request.ec_transfer_params
    return isinstance(params, dict) and params.get(ENCODE_ONLY_KEY) is True


class EncodeOnlyScheduler(Scheduler):
    """vLLM's scheduler with encode-only requests. Every method calls super(), so other mix-ins go beside it.

    `vllm_suite.compat.scheduler` makes it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        connector = self.ec_connector
        # An encoder-only instance ends every request there, by itself.
        self._may_encode_only = connector is not None and connector.is_producer and not self.is_mm_encoder_only
        self._encoding: dict[str, Progress] = {}

    def add_request(self, request: Any) -> None:
        new = request.request_id not in self.requests
        wanted = self._may_encode_only and not self.is_encoder_decoder and asks_to_encode_only(request)
        if new and wanted and request.mm_features and not request.resumable:
            # Tokens in the prefix cache would hide the items under them.
            request.skip_reading_prefix_cache = True
            self._encoding[request.request_id] = Progress()
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        for request_id in self._encoding.keys() & output.num_scheduled_tokens.keys():
            progress = self._encoding[request_id]
            progress.done = progress.planned
            progress.in_flight += 1
        return output

    def _try_schedule_encoder_inputs(
        self,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> Granted:
        ask = super()._try_schedule_encoder_inputs
        progress = self._encoding.get(request.request_id)
        if progress is None or num_new_tokens == 0:
            return ask(request, num_computed_tokens, num_new_tokens, encoder_compute_budget, shift_computed_tokens)
        items = request.mm_features
        if progress.done == len(items):  # its last step has not been reported yet
            return [], 0, encoder_compute_budget, [], []
        start = max(num_computed_tokens, items[progress.done].mm_position.offset)
        whole = request.num_tokens - start
        granted: Granted = ask(request, start, whole, encoder_compute_budget, shift_computed_tokens)
        reach = start + granted[1] + shift_computed_tokens
        planned = sum(item.mm_position.offset < reach for item in items) if granted[1] else progress.done
        token_ends = num_computed_tokens + 1 + shift_computed_tokens
        if planned > progress.done and all(item.mm_position.offset >= token_ends for item in items[planned:]):
            progress.planned = planned
            return granted[0], 1, *granted[2:]
        waiting_for = range(progress.done, planned)
        return self._make_room(request, waiting_for, num_computed_tokens, num_new_tokens, encoder_compute_budget)

    def _make_room(self, request: Any, items: Iterable[int], computed: int, new: int, budget: int) -> Granted:
        """The next item has no place in the encoder cache, or a drafter that reads ahead would read past ``items``:
        compute the tokens of what this request keeps there, as for any other request, or wait where that is nothing.
        """
        progress = self._encoding[request.request_id]
        kept = {*items, *self.encoder_cache_manager.get_cached_input_ids(request)}
        places = [request.mm_features[i].mm_position for i in kept]
        end = max((place.offset + place.length for place in places), default=0)
        if progress.in_flight or end <= computed:
            return [], 0, budget, [], []
        shift = self.num_prefill_lookahead
        granted: Granted = super()._try_schedule_encoder_inputs(
            request, computed, min(new, end - computed), budget, shift
        )
        # Items behind the tokens computed here may have been evicted since; they are looked at again.
        reach = computed + granted[1]
        progress.planned = sum(f.mm_position.offset + f.mm_position.length <= reach for f in request.mm_features)
        return granted

    def _free_encoder_inputs(self, request: Any) -> None:
        super()._free_encoder_inputs(request)
        progress = self._encoding.get(request.request_id)
        if progress is None:
            return
        # An item is stored when its step has run. What no later token of this request can lie in need not stay.
        left = len(request.mm_features) - progress.done
        reach = request.num_computed_tokens + left + self.num_prefill_lookahead
        for item in list(self.encoder_cache_manager.get_cached_input_ids(request)):
            if request.mm_features[item].mm_position.offset >= reach:
                self._free_encoder_input(request, item)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        outputs: dict[int, Any] = super().update_from_output(scheduler_output, model_runner_output)
        for request_id in scheduler_output.num_scheduled_tokens:
            progress = self._encoding.get(request_id)
            if progress is None:
                continue
            progress.in_flight -= 1
            request = self.requests[request_id]
            if progress.in_flight == 0 and progress.done == len(request.mm_features):
                finished = self._finish_encoding(request, progress)
                outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(finished)
        return outputs

    def _finish_encoding(self, request: Any, progress: Progress) -> Any:
        self.finish_requests(request.request_id, RequestStatus.FINISHED_STOPPED)
        kv_transfer_params, ec_transfer_params = progress.answers
        return EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=request.get_finished_reason(),
            events=request.take_events(),
            kv_transfer_params=kv_transfer_params,
            ec_transfer_params=ec_transfer_params,
            trace_headers=request.trace_headers,
        )

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        progress = self._encoding.pop(request.request_id, None)
        answers = super()._free_request(request, *args, **kwargs)
        if progress is not None:
            progress.answers = answers
        return answers

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        progress = self._encoding.get(request.request_id)
        if progress is not None:  # its tokens start again, and with them what has to be in the encoder cache
            progress.done = progress.planned = 0


class EncodeOnlyAsyncScheduler(EncodeOnlyScheduler, AsyncScheduler):
    """The same over vLLM's scheduler that runs a step ahead."""
