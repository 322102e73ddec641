"""What a fleet is asked for: recorded traces of several tools, and workloads made from lengths and a rate."""

from vllm_suite.fleet.traces import TraceError
from vllm_suite.planner.traces.items import item_of
from vllm_suite.planner.traces.load import FORMATS, load
from vllm_suite.planner.traces.synthetic import synthetic
from vllm_suite.planner.traces.workload import Workload

__all__ = ["FORMATS", "TraceError", "Workload", "item_of", "load", "synthetic"]
