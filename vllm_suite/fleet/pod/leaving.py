"""When an instance that gets no new work may end: the rule, of `vllm-suite restart` too, and the wait in a pod."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from vllm_suite.fleet.pod.asking import CONTROL_KEYS, CheckFailed, ask, connect, total

# What peers have yet to fetch, by series, and how many seconds that is waited for once no request runs: somewhat more
# than it is kept for those who never come. Blocks of a prefill are kept for 15 s, outputs of an encoder for 30 s.
LEASES: Mapping[str, float] = {"vllm_suite_kv_leases_outstanding": 20.0, "vllm_suite_ec_leases_outstanding": 40.0}
LOOK_S = 1.0
_IDLE_LOOKS = 3  # a request that is between prefill and decode is nowhere for a moment
_SILENT_LOOKS = 6  # a busy instance may answer late; one that stays silent has nothing to wait for


class Idle:
    """Whether the instance may end, from one look each second; `now` are seconds of one clock.

    Leases are waited for as long as `LEASES` says at most: their gauges come with engine steps, so that of an instance
    without work may be old.
    """

    def __init__(self, now: float) -> None:
        self._looks, self._since = 0, now

    def after(self, requests: int, leases: Mapping[str, float], now: float) -> bool:
        """True once nothing is left, given what the latest look has found; `leases` are those of `leases_in`."""
        if requests:
            self._looks, self._since = 0, now
        else:
            self._looks += 1
        held = any(count and now - self._since <= LEASES[name] for name, count in leases.items())
        return self._looks >= _IDLE_LOOKS and not held

    def unseen(self) -> None:
        """A look got no answer."""
        self._looks = 0


def requests_in(state: Mapping[str, Any]) -> int:
    """Requests in an instance by its own state.

    The server counts them at its door, the engine by vLLM's gauges, which `--disable-log-stats` leaves out.
    """
    load, inside = state.get("load") or {}, state.get("running") or {}
    in_engine = int(load.get("running", 0)) + int(load.get("waiting", 0))
    return max(in_engine, sum(int(count) for count in inside.values()))


def leases_in(value: Callable[[str], float]) -> dict[str, float]:
    """Leases of what an instance keeps for peers, by series; `value` gives the sum of a series' samples."""
    return {name: value(name) for name in LEASES}


def work(url: str, timeout_s: float) -> tuple[int, dict[str, float]]:
    """Requests in the instance at `url`, and leases of what a peer has yet to fetch, by series."""
    requests = requests_in(json.loads(ask(url, "/suite/v1/state", CONTROL_KEYS, timeout_s)))
    text = ask(url, "/metrics", (), timeout_s)
    return requests, leases_in(lambda name: total(text, name))


def drain(
    url: str,
    settle_s: float,
    finish_s: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Wait until routers have stopped sending, then until nothing runs. Raises CheckFailed at the deadline, and where
    nobody is there or gives a good answer for several looks: one late answer must not cost the requests that run.
    """
    sleep(settle_s)
    end, idle, silent = clock() + finish_s, Idle(clock()), 0
    while True:
        try:
            requests, leases = work(url, 5.0)
        except (OSError, http.client.HTTPException, ValueError, CheckFailed) as error:
            silent += 1
            if isinstance(error, ConnectionRefusedError) or silent >= _SILENT_LOOKS or clock() > end:
                raise CheckFailed(f"the instance does not answer, nothing to wait for: {error!r}") from error
            idle.unseen()
            sleep(LOOK_S)
            continue
        now, silent = clock(), 0
        if idle.after(requests, leases, now):
            return "drained"
        if now > end:
            raise CheckFailed(f"after {finish_s:g} s still {requests} requests, {sum(leases.values()):g} leases")
        sleep(LOOK_S)


def outlive(leader: str, limit_s: float) -> str:
    """Wait until nobody listens at `leader` any more: a worker that leaves before its leader ends the leader's work.

    Raises CheckFailed after `limit_s` seconds.
    """
    end, silent = time.monotonic() + limit_s, 0
    while time.monotonic() < end:
        try:
            connect(leader, 2.0).close()
            silent = 0
        except TimeoutError:  # a lost packet, or a leader that is too busy: not the end yet
            silent += 1
            if silent >= _SILENT_LOOKS:
                return "the leader is silent"
        except OSError:
            return "the leader has ended"
        time.sleep(1.0)
    raise CheckFailed(f"after {limit_s:g} s the leader still listens")
