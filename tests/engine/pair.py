"""A prefill and a decode engine, and the ways a test looks at them."""

from __future__ import annotations

import time

from child import free_blocks
from pd import Engine

# Short deadlines, so that a test of a deadline takes seconds.
SUITE = {"pull_timeout_s": 2.0, "claim_timeout_s": 0.5, "lease_s": 1.5, "peer_retry_s": 0.5, "peer_retry_max_s": 1.0}


class Pair:
    """P and D, and the ways a test looks at them."""

    def __init__(self, p: Engine, d: Engine) -> None:
        self.p, self.d = p, d
        self.p_free, self.d_free = p.call(free_blocks), d.call(free_blocks)

    def refused(self, reason: str) -> float:
        return self.d.metric("vllm_suite_kv_refused_total", reason=reason)

    def recomputed(self, reason: str) -> float:
        return self.d.metric("vllm_suite_kv_recomputes_total", reason=reason)

    def pulls(self, outcome: str) -> float:
        return self.d.metric("vllm_suite_kv_pulls_total", outcome=outcome)

    def faults(self, fault: str) -> float:
        return self.d.metric("vllm_suite_kv_contained_faults_total", fault=fault)

    def wait_free(self, timeout_s: float = 10.0) -> None:
        """Every block of both engines is free again within the deadline."""
        deadline = time.monotonic() + timeout_s
        while (now := (self.p.call(free_blocks), self.d.call(free_blocks))) != (self.p_free, self.d_free):
            assert time.monotonic() < deadline, f"free blocks {now}, at start {(self.p_free, self.d_free)}"
            time.sleep(0.05)
