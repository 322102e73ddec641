"""Output-length distributions learned online, without a predictor model.

What ends is observed under a few keys, from the most specific to the least; what still runs or waits is estimated
from them. The scheduler orders and preempts by the estimates, the router balances by them, the planner reads them.
"""

from __future__ import annotations

from vllm_suite.lengths.model import Key, LengthModel
from vllm_suite.lengths.online import OnlineLengths
from vllm_suite.lengths.settings import LengthSettings
from vllm_suite.lengths.storage import FileOutcome, StateError

__all__ = ["FileOutcome", "Key", "LengthModel", "LengthSettings", "OnlineLengths", "StateError"]
