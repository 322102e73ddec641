"""Where each request stands: its estimate, what the rule and its group make of it, and when that is looked at anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vllm_dler.config import SchedulerSettings
from vllm_dler.groups import Groups
from vllm_dler.order import Tracked, size_of
from vllm_dler.queue import LengthQueue
from vllm_dler.rules import BoostRule, KappaRule
from vllm_suite.compat.length_policy import End
from vllm_suite.lengths import OnlineLengths

# Ends that tell how long an answer is, and those that only tell how long it is at least.
EXACT: tuple[End, ...] = ("stop",)
CENSORED: tuple[End, ...] = ("length", "repetition", "abort")
# Waiting requests that are looked at for each that ended.
_SHARE = 4
# Expectations kept for requests that are alike.
_MOST_ALIKE = 4096


class Placement:
    """Gives requests their keys. What is learned reaches those that wait in `begin_step`, at no other time.

    Attributes:
        queues: whose ranks follow.
        boosted: called where a waiting request moves forward.
    """

    def __init__(
        self, settings: SchedulerSettings, lengths: OnlineLengths, boosted: Callable[[], None], now: float
    ) -> None:
        self._settings = settings
        self.lengths = lengths
        self.rule = KappaRule(settings.kappa) if settings.rule == "kappa" else BoostRule(settings.boost)
        self.groups = Groups(settings.groups.probe < 1, settings.groups.stop_after)
        self.queues: list[LengthQueue] = []
        self.boosted = boosted
        self._touched: set[Tracked] = set()  # whose group learned something
        self._stale = False  # keys of all may have changed
        self._learned = 0  # finished requests that waiting ones do not know of
        self._relearned = now
        self._alike: dict[tuple[tuple[str, ...], int], float] = {}  # what requests expect when they begin
        self._alike_learned, self._alike_since = 0, now

    def begin_step(self, now: float) -> None:
        """Let waiting requests know what was learned, where it is time."""
        if self._alike_learned:
            self._forget_alike(now)
        if self._stale or (self._learned and self._due(now)):
            self._relearn(now)
        elif self._touched:
            touched, self._touched = self._touched, set()
            for state in touched:
                self.place(state)
                for queue in self.queues:
                    queue.refresh(state)

    def renew(self) -> None:
        """Look at everything in the next step."""
        self._stale = True

    def place(self, state: Tracked) -> float | None:
        """Estimate a request and lower its key if the estimate says so; returns the expected output still to come."""
        group, groups = state.group, self._settings.groups
        remaining = self.expected(state)
        size = size_of(state.uncached, remaining, self._settings.prefill_weight)
        if group is not None and group.probe is state:
            size *= groups.probe
        known = state.predicted is not None
        if state.lower(self.rule.offset(size), size) and known:
            self.boosted()
        if group is not None:
            state.spread = -(remaining or 0.0)
            if group.share(state, self.rule.lowest):
                self._touched.update(group.members.values())
        return remaining

    def expected(self, state: Tracked) -> float | None:
        """Output tokens still to come; None where nothing is known."""
        age, group = int(state.request.num_output_tokens), state.group
        if group is None or not group.lengths:
            return self.lengths.remaining(state.keys, age, state.cap) if age else self._at_first(state)
        running = [m.request.num_output_tokens for m in group.members.values() if m is not state]
        return self.lengths.remaining(state.keys, age, state.cap, group=group.name, running=running)

    def ended(self, state: Tracked, end: End, tokens: int, now: float) -> Iterable[str]:
        """Learn from a request that ended after ``tokens``; returns ids of samples that are no longer wanted.

        ``error`` teaches nothing, and neither does an answer without tokens, or one that another instance generates.
        """
        exact, group = end in EXACT, state.group
        if tokens and (exact or end in CENSORED) and not only_prefill(state):
            name = group.name if group is not None else None
            self.lengths.observe(state.keys, tokens, censored=not exact, now=now, group=name)
            self._learned += 1
            self._alike_learned += 1
        self._touched.discard(state)
        if group is None:
            return ()
        unwanted = self.groups.leave(state, tokens if exact else None)
        if group.members:
            self._touched.update(group.members.values())
        else:
            self.lengths.forget(group.name)
        return unwanted

    def _at_first(self, state: Tracked) -> float | None:
        """What a request without output expects; as it was worked out for one like it, not long ago."""
        lengths = self.lengths
        if state.turn != lengths.turns:
            state.turn, state.alike = lengths.turns, (lengths.heard(state.keys), state.cap)
        alike = state.alike
        found = self._alike.get(alike)
        if found is None:
            found = lengths.remaining(alike[0], 0, state.cap)
            if found is not None and len(self._alike) < _MOST_ALIKE:
                self._alike[alike] = found
        return found

    def _forget_alike(self, now: float) -> None:
        settings = self._settings
        if self._alike_learned >= settings.relearn_every or now - self._alike_since >= settings.relearn_s:
            self._alike.clear()
            self._alike_learned, self._alike_since = 0, now

    def _due(self, now: float) -> bool:
        """Whether enough was learned. A long queue is looked at less often, so that what it costs for each request
        that ends stays the same."""
        if self._learned * _SHARE < sum(map(len, self.queues)):
            return False
        return self._learned >= self._settings.relearn_every or now - self._relearned >= self._settings.relearn_s

    def _relearn(self, now: float) -> None:
        self._learned, self._stale, self._relearned = 0, False, now
        self._alike.clear()
        for queue in self.queues:
            for state in queue.states():
                self.place(state)
        # Groups' deadlines have settled only now.
        for state in self._touched:
            if state.group is not None:
                state.group.share(state, self.rule.lowest)
        self._touched = set()
        for queue in self.queues:
            queue.rekey()


def prefilled_elsewhere(state: Tracked) -> bool:
    """Its KV comes with it once; after an eviction it has to be computed here."""
    params = state.request.kv_transfer_params
    return isinstance(params, dict) and bool(params.get("do_remote_prefill"))


def only_prefill(state: Tracked) -> bool:
    """A decode instance generates the answer; this one ends after a token."""
    params = state.request.kv_transfer_params
    return isinstance(params, dict) and bool(params.get("do_remote_decode"))
