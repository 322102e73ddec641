"""vLLM's `RequestQueue` as a heap of ranks that stand still while a step is scheduled."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vllm_dler.order import Rank, Tracked

_Entry = tuple[Rank, Tracked]


class LengthQueue:
    """Requests by rank. A rank is read when a request is added and again in `rekey`, at no other time, so what
    `peek_request` returns is what `pop_request` returns next.

    Requests that left stay in the heap as husks until they reach its top. Methods are those of vLLM's
    `RequestQueue`; to prepend is to add, since the rank is the place.
    """

    def __init__(self, tracked: Callable[[Any], Tracked]) -> None:
        self._tracked = tracked
        self._heap: list[_Entry] = []
        self._live: dict[str, _Entry] = {}

    def add_request(self, request: Any) -> None:
        state = self._tracked(request)
        entry = (state.rank, state)
        self._live[request.request_id] = entry
        heapq.heappush(self._heap, entry)

    def peek_request(self) -> Any:
        """The first request. Raises IndexError where there is none."""
        heap, live = self._heap, self._live
        while heap:
            entry = heap[0]
            request = entry[1].request
            if live.get(request.request_id) is entry:
                return request
            heapq.heappop(heap)
        raise IndexError("peek from an empty queue")

    def pop_request(self) -> Any:
        """Remove the first request. Raises IndexError where there is none."""
        request = self.peek_request()
        heapq.heappop(self._heap)
        del self._live[request.request_id]
        return request

    def prepend_request(self, request: Any) -> None:
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Any]) -> None:
        for request in requests:
            self.add_request(request)

    def remove_request(self, request: Any) -> None:
        """Raises ValueError for a request that is not here."""
        if self._live.pop(request.request_id, None) is None:
            raise ValueError(f"request {request.request_id} is not in the queue")
        self._sweep()

    def remove_requests(self, requests: Iterable[Any]) -> None:
        """Those that are not here are passed over: vLLM asks both of its queues."""
        for request in requests:
            self._live.pop(request.request_id, None)
        self._sweep()

    def refresh(self, state: Tracked) -> None:
        """Read the rank of one request again, where it is here."""
        entry = self._live.get(state.request.request_id)
        if entry is not None and entry[0] != (rank := state.rank):
            self._live[state.request.request_id] = new = (rank, state)
            heapq.heappush(self._heap, new)
            self._sweep()

    def rekey(self) -> None:
        """Read all ranks again."""
        live = self._live
        for request_id, (_, state) in live.items():
            live[request_id] = (state.rank, state)
        self._heap = list(live.values())
        heapq.heapify(self._heap)

    def first(self, count: int) -> list[Tracked]:
        """The next ``count``, in order."""
        return [state for _, state in heapq.nsmallest(count, self._live.values(), key=_rank)]

    def states(self) -> Iterator[Tracked]:
        """What waits, in no order."""
        return (state for _, state in self._live.values())

    def __bool__(self) -> bool:
        return bool(self._live)

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Any]:
        return (state.request for _, state in sorted(self._live.values(), key=_rank))

    def _sweep(self) -> None:
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = list(self._live.values())
            heapq.heapify(self._heap)


def _rank(entry: _Entry) -> Rank:
    return entry[0]
