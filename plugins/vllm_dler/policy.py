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
from vllm_dler.groups import Groups
from vllm_dler.kappa import Controller
from vllm_dler.order import Arrivals, Tracked, size_of
from vllm_dler.queue import LengthQueue
from vllm_dler.rules import BoostRule, KappaRule
from vllm_dler.stats import Stats
from vllm_dler.victims import Victims
from vllm_dler.waits import Waits
from vllm_suite.compat.length_policy import End, Eviction
from vllm_suite.lengths import OnlineLengths

Clock = Callable[[], float]

# Ends that tell how long an answer is, and those that only tell how long it is at least.
_EXACT: tuple[End, ...] = ("stop",)
# Waiting requests that are looked at for each that ended.
_SHARE = 8
# The gate looks at so many waiting requests; no step begins more.
_AT_ONCE = 16
# Ends that tell how long requests take here.
_LASTED: tuple[End, ...] = ("stop", "length", "repetition")
_CENSORED: tuple[End, ...] = ("length", "repetition", "abort")


class LengthPolicy:
    """State and rules of one scheduler. Methods are called from the engine's one thread.

    Attributes:
        reorders: False where vLLM's own queues and victims are to stay.
        sorts_running, gates: whether `sort_running` and `places` are wanted.
        headroom: tokens that an admission leaves free for those that run: what each is expected to generate,
            `headroom_tokens` at most.
        rule: the order.
        lengths: what is known of output lengths.
        stats: what is counted.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        *,
        by_priority: bool = False,
        max_model_len: int,
        clock: Clock = time.time,
        lengths: OnlineLengths | None = None,
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.lengths = OnlineLengths(settings.lengths) if lengths is None else lengths
        self.reorders = settings.reorders
        self.sorts_running = settings.reorders and settings.victims.enabled
        self.headroom = 0
        self._room = settings.headroom_tokens if settings.reorders else 0
        self.gates = settings.reorders and settings.gate.enabled
        self.rule = KappaRule(settings.kappa) if settings.rule == "kappa" else BoostRule(settings.boost)
        self.now = clock()
        self.stats = Stats(settings.classes.max_labels)
        self.waits = Waits(settings.adaptive.window)
        self._adapts = settings.adaptive.enabled
        self._controller = Controller(settings.adaptive, self.now)
        self._by_priority = by_priority
        self._max_model_len = max_model_len
        self._arrivals = Arrivals()
        self._states: dict[str, Tracked] = {}
        self._groups = Groups(settings.groups.probe < 1, settings.groups.stop_after)
        self._touched: set[Tracked] = set()  # whose group learned something
        self._victims = Victims(settings.victims, self.tracked, self._expected)
        self._queues: list[LengthQueue] = []
        self._stops: dict[str, None] = {}  # in order
        self._sorted = False  # whether victims were chosen for this step
        self._learned = 0  # finished requests that waiting ones do not know of
        self._relearned = self.now
        self._stale = False  # keys of all may have changed

    def tracked(self, request: Any) -> Tracked:
        """What is known of a request. One that never arrived, arrives now: nothing is lost over it."""
        state = self._states.get(request.request_id)
        return state if state is not None and state.request is request else self.arrived(request, 0)

    def queue(self, base: type = object) -> Any:
        """A new queue, for `Scheduler.waiting` and the like; its class derives from ``base``."""
        kind = LengthQueue if base is object else type(LengthQueue.__name__, (LengthQueue, base), {})
        made: LengthQueue = kind(self.tracked)
        self._queues.append(made)
        return made

    def arrived(self, request: Any, cached_tokens: int) -> Tracked:
        """Fix a request's key, before vLLM queues it. ``cached_tokens`` of its prompt need not be computed."""
        settings = self.settings
        arguments = read(request)
        label = self.stats.label(arguments.label)
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
            label=label,
            cap=self._cap(request),
            uncached=max(request.num_prompt_tokens - cached_tokens, 0),
            lost=request.num_prompt_tokens - (0 if _prefilled_elsewhere(request) else cached_tokens),
            cut=cut,
        )
        self._states[request.request_id] = state
        if settings.groups.enabled and arguments.group is not None:
            group = self._groups.join(arguments.group, state, arguments.stop_after)
            self._stops.update({request.request_id: None} if group.enough() else {})  # it came too late
        state.predicted = self._place(state)
        self.waits.arrived(state)
        self.rule.arrived(state.size)
        return state

    def renewed(self, request: Any) -> None:
        """A streaming session got its next input: a new arrival under the same id."""
        state = self.tracked(request)
        self.waits.left(state)
        state.seq, state.arrival = self._arrivals.next(request.arrival_time, self.clock())
        state.key = state.deadline = math.inf
        state.cap = self._cap(request)
        state.uncached = max(request.num_prompt_tokens - request.num_computed_tokens, 0)
        state.admitted = None
        state.base = state.evictions = 0
        state.predicted = self._place(state)
        self.waits.arrived(state)
        self._stale = True  # it may be in a queue

    def begin_step(self) -> None:
        """Read the clock, and let waiting requests know what was learned."""
        self.now = now = self.clock()
        self._sorted = False
        if self._adapts:
            self._adapt(now)
        learned = self._learned
        if self._stale or (learned and self._due(learned, now)):
            self._relearn(now)
        elif self._touched:
            touched, self._touched = self._touched, set()
            for state in touched:
                self._place(state)
                for queue in self._queues:
                    queue.refresh(state)

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
                rest = self._expected(state)
                left = state.cap - state.request.num_output_tokens if rest is None else math.ceil(rest)
                state.room = max(min(self._room, left), 1)
                self.headroom += state.room

    def _stands(self, state: Tracked) -> None:
        """A request no longer runs."""
        self.headroom -= state.room
        state.room = 0

    def evicted(self, request: Any, reason: Eviction) -> None:
        """A running request is about to be queued again, without its KV."""
        state = self.tracked(request)
        self._stands(state)
        if reason == "kv_full":
            state.evictions += 1
        state.base = request.num_output_tokens
        foreseen = self._sorted or not self.sorts_running or reason != "kv_full"
        self.stats.count("evictions", reason if foreseen else "unforeseen")
        self._place(state)

    def finished(self, request: Any, end: End) -> None:
        """A request ended. ``error`` teaches nothing, and neither does an answer without tokens."""
        state = self._states.pop(request.request_id, None)
        if state is None:
            return
        tokens = request.num_output_tokens
        exact = end in _EXACT
        self.waits.left(state)
        self._stands(state)
        group = state.group
        if tokens and (exact or end in _CENSORED) and not _only_prefill(request):
            name = group.name if group is not None else None
            self.lengths.observe(state.keys, tokens, censored=not exact, now=self.now, group=name)
            self._learned += 1
        if group is not None:
            self._stops.update(dict.fromkeys(self._groups.leave(state, tokens if exact else None)))
            if group.members:
                self._touched.update(group.members.values())
            else:
                self.lengths.forget(group.name)
        self._touched.discard(state)
        if end in _LASTED:
            self.rule.finished(self.now - state.arrival)
        self.stats.finished(state, end, tokens, self.now)

    def take_stops(self) -> list[str]:
        """Ids of requests that are no longer wanted: enough of their group have finished."""
        if not self._stops:
            return []
        stops = [request_id for request_id in self._stops if request_id in self._states]
        self._stops.clear()
        self.stats.count("group_stops", amount=len(stops))
        return stops

    def _cap(self, request: Any) -> int:
        """Most tokens that a request can generate."""
        return max(min(int(request.max_tokens), self._max_model_len - int(request.num_prompt_tokens)), 1)

    def report(self) -> dict[str, Any]:
        """See `LengthPolicy.report`."""
        waiting = [state for queue in self._queues for state in queue.states()]
        return dict(self.stats.report(waiting, self.waits, self._scale(), self.clock()))

    def _scale(self) -> tuple[str, float]:
        """Series and value of what the rule goes by now."""
        return ("kappa", self.rule.kappa) if isinstance(self.rule, KappaRule) else ("boost_seconds", self.rule.scale)

    def _held(self, state: Tracked) -> tuple[float, int]:
        """Output still to come, and tokens of KV once it runs; an unknown answer may be as long as allowed."""
        request = state.request
        age = int(request.num_output_tokens)
        rest = self._expected(state)
        return (float(state.cap - age) if rest is None else rest), int(request.num_prompt_tokens) + age

    def _cut(self, request: Any, arguments: Arguments) -> bool:
        """Apply the cap of the request's class; whether it is shorter than what was asked for."""
        caps = self.settings.caps
        if caps and request.sampling_params is not None:
            cap = caps.get(arguments.label or "", caps.get("*"))
            if cap is not None and cap < request.max_tokens:
                request.max_tokens = cap
                return True
        return False

    def _place(self, state: Tracked) -> float | None:
        """Estimate a request and lower its key if the estimate says so; returns the expected output still to come."""
        group = state.group
        remaining = self._expected(state)
        size = size_of(state.uncached, remaining, self.settings.prefill_weight)
        if group is not None and group.probe is state:
            size *= self.settings.groups.probe
        known = state.predicted is not None
        if state.lower(self.rule.offset(size), size) and known:
            self.stats.count("boosts")
        if group is not None:
            state.spread = -(remaining or 0.0)
            if group.share(state, self.rule.lowest):
                self._touched.update(group.members.values())
        return remaining

    def _expected(self, state: Tracked) -> float | None:
        """Output tokens still to come; None where nothing is known."""
        age, group = int(state.request.num_output_tokens), state.group
        if group is None or not group.lengths:
            return self.lengths.remaining(state.keys, age, state.cap)
        running = [m.request.num_output_tokens for m in group.members.values() if m is not state]
        return self.lengths.remaining(state.keys, age, state.cap, group=group.name, running=running)

    def _adapt(self, now: float) -> None:
        rule = self.rule
        assert isinstance(rule, KappaRule)
        kappa = self._controller.decide(rule.kappa, self.waits, now)
        self._stale |= kappa < rule.kappa
        rule.kappa = kappa

    def _due(self, learned: int, now: float) -> bool:
        """Whether enough was learned. A long queue is looked at less often, so that what it costs for each request
        that ends stays the same."""
        if learned * _SHARE < sum(map(len, self._queues)):
            return False
        return learned >= self.settings.relearn_every or now - self._relearned >= self.settings.relearn_s

    def _relearn(self, now: float) -> None:
        self._learned, self._stale, self._relearned = 0, False, now
        for queue in self._queues:
            for state in queue.states():
                self._place(state)
        # Groups' deadlines have settled only now.
        for state in self._touched:
            if state.group is not None:
                state.group.share(state, self.rule.lowest)
        self._touched = set()
        for queue in self._queues:
            queue.rekey()


def _prefilled_elsewhere(request: Any) -> bool:
    """Its KV comes with it once; after an eviction it has to be computed here."""
    params = request.kv_transfer_params
    return isinstance(params, dict) and bool(params.get("do_remote_prefill"))


def _only_prefill(request: Any) -> bool:
    """A decode instance generates the answer; this one ends after a token."""
    params = request.kv_transfer_params
    return isinstance(params, dict) and bool(params.get("do_remote_decode"))


def make_policy(vllm_config: Any, *, clock: Clock = time.time) -> LengthPolicy:
    """What the catalog names: a policy with the settings in ``additional_config``; ``clock`` is for simulations.

    Raises:
        SelectionError: the settings are wrong.
    """
    return LengthPolicy(
        SchedulerSettings.of(vllm_config),
        by_priority=vllm_config.scheduler_config.policy == "priority",
        max_model_len=vllm_config.model_config.max_model_len,
        clock=clock,
    )
