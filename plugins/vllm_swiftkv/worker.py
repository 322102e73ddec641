"""What vLLM mixes into its worker class (``--worker-extension-cls``) so that the API server can read the counters."""

from __future__ import annotations

from vllm_swiftkv.counters import COUNTERS


class SwiftKVWorkerExtension:
    """One method for vLLM's ``collective_rpc``. A worker extension of your own can derive from this one."""

    def swiftkv_counters(self) -> dict[str, int]:
        """Totals of this worker's process; see :class:`vllm_swiftkv.counters.Counters`."""
        return COUNTERS.snapshot()
