"""How an engine with the KV connector starts, or says at once why it does not; and what it takes while it idles."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from child import import_engine
from pair import Pair
from pd import Engine, Spec

ENGINE_START_FAILS_WITHIN_S = 30.0  # importing is done; what is measured is that it does not hang


def _start_error(spec: Spec) -> str:
    import_engine()
    begun = time.monotonic()
    engine = Engine(spec)
    try:
        with pytest.raises(RuntimeError) as caught:
            engine.wait_ready()
    finally:
        engine.close()
    assert time.monotonic() - begun < ENGINE_START_FAILS_WITHIN_S
    return str(caught.value)


def test_a_taken_side_channel_port_fails_at_once(model: Path) -> None:
    """Stock: start-up hangs for ever."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        message = _start_error(Spec("p", model, env={"VLLM_NIXL_SIDE_CHANNEL_PORT": port}))
    assert f"127.0.0.1:{port}" in message
    assert "VLLM_NIXL_SIDE_CHANNEL_PORT" in message


def test_unknown_settings_are_named(model: Path) -> None:
    assert "lease_seconds" in _start_error(Spec("p", model, suite={"lease_seconds": 3}))
    assert "kv_lease" in _start_error(Spec("p", model, extra={"kv_lease": 3}))
    assert "bidirectional_kv_xfer" in _start_error(Spec("p", model, extra={"bidirectional_kv_xfer": True}))


def test_the_agent_does_not_spin_and_the_model_keeps_its_cores(shared_pair: Pair) -> None:
    assert shared_pair.d.call(_cores) == os.cpu_count() or shared_pair.d.call(_cores) == len(os.sched_getaffinity(0))
    assert shared_pair.d.call(_idle_cpu_share) < 0.10


def _cores(llm: Any) -> int:
    return len(os.sched_getaffinity(0))


def _idle_cpu_share(llm: Any) -> float:
    """CPU seconds a second this process takes while the engine sleeps; NIXL's thread alone spins at 0.3-0.8."""
    assert threading.current_thread() is threading.main_thread()
    begun, cpu = time.monotonic(), time.process_time()
    time.sleep(1.5)
    return (time.process_time() - cpu) / (time.monotonic() - begun)
