"""All decisions of the length-aware scheduler; :mod:`vllm_suite.compat.length_scheduler` asks for them.

Nothing here imports vLLM. Times are seconds on ``clock``, which is vLLM's own for arrivals: the wall clock. It is
read once per step, so that ranks stand still while vLLM schedules.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from vllm_dler.arguments import Arguments, keys_of, read
from vllm_dler.config import SchedulerSettings
from vllm_dler.gate import places
from vllm_dler.kappa import Controller
from vllm_dler.order import Arrivals, Tracked
from vllm_dler.placement import Placement, prefilled_elsewhere
from vllm_dler.queue import LengthQueue
from vllm_dler.rules import KappaRule
from vllm_dler.state import StateFile
from vllm_dler.stats import Stats
from vllm_dler.victims import Victims
from vllm_dler.waits import Waits
from vllm_suite.compat.length_policy import End, Eviction
from vllm_suite.lengths import OnlineLengths

Clock = Callable[[], float]

# Ends that tell how long requests take here.
_LASTED: tuple[End, ...] = ("stop", "length", "repetition")
# Tokens of headroom for a running request of which nothing is known.
_UNKNOWN_ROOM = 16
# The gate looks at so many waiting requests; no step begins more.
_AT_ONCE = 16


class LengthPolicy:
    """State and rules of one scheduler. Methods are called from the engine's one thread.

    Attributes:
        reorders: False where vLLM's own queues and victims are to stay.
        sorts_running, gates: whether `sort_running` and `places` are wanted.
        headroom: tokens that an admission leaves free for those that run.
        placement: who gives requests their keys.
        lengths: what is known of output lengths.
        stats, waits: what is counted.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        *,
        by_priority: bool = False,
        max_model_len: int,
        clock: Clock = time.time,
        lengths: OnlineLengths | None = None,
        state_file: str | None = None,
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.now = clock()
        self.reorders = settings.reorders
        self.sorts_running = settings.reorders and settings.victims.enabled
        self.gates = settings.reorders and settings.gate.enabled
        self.headroom = 0
        self._room = settings.headroom_tokens if settings.reorders else 0
        self.stats = Stats(settings.classes.max_labels)
        self.waits = Waits(settings.adaptive.window)
        self.lengths = OnlineLengths(settings.lengths) if lengths is None else lengths
        self._file = StateFile(self.lengths, state_file, lambda *what: self.stats.count("state", *what), self.now)
        self.placement = Placement(settings, self.lengths, lambda: self.stats.count("boosts"), self.now)
        self._controller = Controller(settings.adaptive, self.now)
        self._by_priority = by_priority
        self._max_model_len = max_model_len
        self._arrivals = Arrivals()
        self._states: dict[str, Tracked] = {}
        self._victims = Victims(settings.victims, self.tracked, self.placement.expected)
        self._stops: dict[str, None] = {}  # in order
        self._sorted = False  # whether victims were chosen for this step

    def tracked(self, request: Any) -> Tracked:
        """What is known of a request. One that never arrived, arrives now: nothing is lost over it."""
        state = self._states.get(request.request_id)
        return state if state is not None and state.request is request else self.arrived(request, 0)

    def queue(self, base: type = object) -> Any:
        """A new queue, for `Scheduler.waiting` and the like; its class derives from ``base``."""
        kind = LengthQueue if base is object else type(LengthQueue.__name__, (LengthQueue, base), {})
        made: LengthQueue = kind(self.tracked)
        self.placement.queues.append(made)
        return made

    def arrived(self, request: Any, cached_tokens: int) -> Tracked:
        """Fix a request's key, before vLLM queues it. ``cached_tokens`` of its prompt need not be computed."""
        settings = self.settings
        arguments = read(request)
        for name in arguments.refused:
            self.stats.count("refused_arguments", name)
        cut = self._cut(request, arguments)
        seq, arrival = self._arrivals.next(request.arrival_time, self.clock())
        state = Tracked(
            request,
            seq,
            arrival,
            priority=request.priority if self._by_priority else 0,
            keys=keys_of(request, arguments, settings.classes.prefix_tokens, settings.classes.same_prompt),
            label=self.stats.label(arguments.label),
            cap=self._cap(request),
            uncached=max(request.num_prompt_tokens - cached_tokens, 0),
            cut=cut,
        )
        state.lost = request.num_prompt_tokens if prefilled_elsewhere(state) else state.uncached
        self._states[request.request_id] = state
        if settings.groups.enabled and arguments.group is not None:
            group = self.placement.groups.join(arguments.group, state, arguments.stop_after)
            self._stops.update({request.request_id: None} if group.enough() else {})  # it came too late
        self._begin_waiting(state)
        return state

    def renewed(self, request: Any) -> None:
        """A streaming session got its next input: a new arrival under the same id."""
        state = self.tracked(request)
        self.waits.left(state)
        state.seq, state.arrival = self._arrivals.next(request.arrival_time, self.clock())
        state.key = state.deadline = math.inf
        state.cap, state.turn = self._cap(request), -1
        state.uncached = max(request.num_prompt_tokens - request.num_computed_tokens, 0)
        state.admitted = state.predicted = None
        state.base = state.evictions = 0
        self._begin_waiting(state)
        self.placement.renew()  # it may be in a queue

    def begin_step(self) -> None:
        """Read the clock, and let waiting requests know what was learned."""
        self.now = self.clock()
        self._sorted = False
        if self.settings.adaptive.enabled:
            self._adapt()
        self.placement.begin_step(self.now)
        self._file.begin_step(self.now)

    def sort_running(self, running: list[Any]) -> None:
        """Put the victims of this step at the end, in place."""
        self._victims.sort(running)
        self._sorted = True

    def places(self, running: Iterable[Any], waiting: LengthQueue, capacity: int) -> int:
        """How many of ``waiting`` may begin, so that at their peak all requests fit ``capacity`` tokens of KV."""
        now = [self._held(self.tracked(request)) for request in running]
        next_ones = [self._held(state) for state in waiting.first(_AT_ONCE)]
        count = places(now, next_ones, self.settings.gate.usage * capacity)
        if count < len(next_ones):
            self.stats.count("gate_closed_steps")
        return count

    def admitted(self, request_ids: Iterable[str]) -> None:
        """Requests began to run, or do so again."""
        for request_id in request_ids:
            state = self._states.get(request_id)
            if state is None:
                continue
            if state.admitted is None:
                state.admitted = self.now
                self.waits.admitted(state, self.now)
            if self._room and not state.room:
                state.room = self._room_for(state)
                self.headroom += state.room

    def evicted(self, request: Any, reason: Eviction) -> None:
        """A running request is about to be queued again, without its KV."""
        state = self.tracked(request)
        self._stop_running(state)
        if reason == "kv_full":
            state.evictions += 1
        state.base = request.num_output_tokens
        foreseen = self._sorted or not self.sorts_running or reason != "kv_full"
        self.stats.count("evictions", reason if foreseen else "unforeseen")
        self.placement.place(state)

    def finished(self, request: Any, end: End) -> None:
        """A request ended."""
        state = self._states.pop(request.request_id, None)
        if state is None:
            return
        tokens = int(request.num_output_tokens)
        self.waits.left(state)
        self._stop_running(state)
        self._stops.update(dict.fromkeys(self.placement.ended(state, end, tokens, self.now)))
        if end in _LASTED:
            self.placement.rule.finished(self.now - state.arrival)
        self.stats.finished(state, end, tokens, self.now)

    def take_stops(self) -> list[str]:
        """Ids of requests that are no longer wanted: enough of their group have finished."""
        if not self._stops:
            return []
        stops = [request_id for request_id in self._stops if request_id in self._states]
        self._stops.clear()
        self.stats.count("group_stops", amount=len(stops))
        return stops

    def report(self) -> dict[str, Any]:
        """See `vllm_suite.compat.length_policy.LengthPolicy.report`."""
        waiting = [state for queue in self.placement.queues for state in queue.states()]
        rule = self.placement.rule
        scale = ("kappa", rule.kappa) if isinstance(rule, KappaRule) else ("boost_seconds", rule.scale)
        return dict(self.stats.report(waiting, self.waits, scale, self.clock()))

    def close(self) -> None:
        """The engine ends."""
        self._file.close()

    def _begin_waiting(self, state: Tracked) -> None:
        state.predicted = self.placement.place(state)
        self.waits.arrived(state)
        self.placement.rule.arrived(state.size)

    def _room_for(self, state: Tracked) -> int:
        new = not state.request.num_output_tokens and state.predicted is not None
        rest = state.predicted if new else self.placement.expected(state)
        if rest is None:
            room = min(_UNKNOWN_ROOM, state.cap - int(state.request.num_output_tokens))
        else:
            room = math.ceil(self.settings.headroom_share * rest)
        return max(min(self._room, room), 1)

    def _stop_running(self, state: Tracked) -> None:
        self.headroom -= state.room
        state.room = 0

    def _cap(self, request: Any) -> int:
        """Most tokens that a request can generate."""
        return max(min(int(request.max_tokens), self._max_model_len - int(request.num_prompt_tokens)), 1)

    def _cut(self, request: Any, arguments: Arguments) -> bool:
        """Apply the cap of the request's class; whether it is shorter than what was asked for."""
        caps = self.settings.caps
        if caps and request.sampling_params is not None:
            cap = caps.get(arguments.label or "", caps.get("*"))
            if cap is not None and cap < request.max_tokens:
                request.max_tokens = cap
                return True
        return False

    def _held(self, state: Tracked) -> tuple[float, int]:
        """Output still to come, and tokens of KV once it runs; an unknown answer may be as long as allowed."""
        request = state.request
        age = int(request.num_output_tokens)
        rest = self.placement.expected(state)
        return (float(state.cap - age) if rest is None else rest), int(request.num_prompt_tokens) + age

    def _adapt(self) -> None:
        rule = self.placement.rule
        assert isinstance(rule, KappaRule)  # the settings allow no other
        kappa = self._controller.decide(rule.kappa, self.waits, self.now)
        if kappa < rule.kappa:
            self.placement.renew()
        rule.kappa = kappa


def make_policy(vllm_config: Any, *, clock: Clock = time.time) -> LengthPolicy:
    """What the catalog names: a policy with the settings in ``additional_config``; ``clock`` is for simulations.

    Raises:
        SelectionError: the settings are wrong.
    """
    settings, parallel = SchedulerSettings.of(vllm_config), vllm_config.parallel_config
    path = settings.state_file
    if path is not None and parallel.data_parallel_size > 1:
        path = f"{path}.{parallel.data_parallel_index}"
    return LengthPolicy(
        settings,
        by_priority=vllm_config.scheduler_config.policy == "priority",
        max_model_len=vllm_config.model_config.max_model_len,
        clock=clock,
        state_file=path,
    )
