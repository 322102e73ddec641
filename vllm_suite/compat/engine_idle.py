"""Let an engine that only waits for its connectors sleep until something happens.

vLLM steps such an engine a thousand times a second: a prefill instance with a finished prefill that nobody has
fetched yet, or an instance whose only requests wait for a pull or for encoder outputs, keeps 15-90 % of a core busy
in the engine core and again in each worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import EngineCoreProc

MAX_SLEEP_S = 60.0


class IdleAware(Protocol):
    """What a KV or EC connector offers to take part. An engine sleeps where all of its connectors do."""

    def idle_wait_s(self, unfinished: bool) -> float:
        """Seconds this engine may sleep now as far as this connector goes: 0 for none, infinite where it waits for
        nothing. ``unfinished``: some request still wants tokens, and no connector says that it holds it: one may
        have a method ``held_requests()``, the number of requests that wait for nothing but the connector itself."""

    def set_wake(self, wake: Callable[[], None]) -> None:
        """Take a function, callable from any thread, that ends the sleep."""


# ### PATCH START: EngineCoreProc._process_engine_step
# Why: the connector interface has no "nothing to do until ..." answer; a connector is only asked inside steps, and
# sleeping there would delay new requests. Here the sleep is on the engine's own input queue, so they end it.
# The signature is unchanged and the upstream method runs first. Data-parallel engines step in lockstep and are
# left alone.
# Remove when: vLLM's connectors can tell the engine how long it may wait.
_upstream_step = EngineCoreProc._process_engine_step


def _process_engine_step(self: Any) -> bool:
    executed: bool = _upstream_step(self)
    if executed or type(self) is not EngineCoreProc or self.batch_queue:
        return executed
    both = (self.scheduler.get_kv_connector(), self.scheduler.get_ec_connector())
    connectors = [connector for connector in both if connector is not None]
    if not connectors or not all(hasattr(connector, "idle_wait_s") for connector in connectors):
        return executed
    queue = self.input_queue
    if not getattr(self, "_suite_wake_set", False):
        self._suite_wake_set = True
        for connector in connectors:
            connector.set_wake(lambda: queue.put_nowait((EngineCoreRequestType.WAKEUP, None)))
    held = sum(connector.held_requests() for connector in connectors if hasattr(connector, "held_requests"))
    unfinished = self.scheduler.get_num_unfinished_requests() > held
    seconds = min(connector.idle_wait_s(unfinished) for connector in connectors)
    if seconds > 0:
        with queue.not_empty:
            if not queue.queue:
                queue.not_empty.wait(min(seconds, MAX_SLEEP_S))
    return executed


def install() -> None:
    """Put the patch in place; a second call changes nothing."""
    EngineCoreProc._process_engine_step = _process_engine_step


# ### PATCH END
