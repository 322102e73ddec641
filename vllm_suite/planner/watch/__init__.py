"""Replanning: reads a fleet's own metrics, notices when its traffic has shifted, says whether to change the plan."""

from vllm_suite.planner.watch.decide import Change, Decision, decide, difference
from vllm_suite.planner.watch.loop import Planner, Settings, watch
from vllm_suite.planner.watch.prometheus import Prometheus
from vllm_suite.planner.watch.recorded import Recorded
from vllm_suite.planner.watch.series import WatchSeries
from vllm_suite.planner.watch.shift import Shift, ShiftTest
from vllm_suite.planner.watch.window import Histogram, WatchError, Window, workload_of

__all__ = [
    "Change", "Decision", "Histogram", "Planner", "Prometheus", "Recorded", "Settings", "Shift", "ShiftTest",
    "WatchError", "WatchSeries", "Window", "decide", "difference", "watch", "workload_of",
]  # fmt: skip
