"""For whoever names a scheduler himself: ``--scheduler-cls vllm_dler.scheduler.make_scheduler``."""

from __future__ import annotations

from typing import Any


def make_scheduler(**kwargs: Any) -> Any:
    """The length-aware scheduler, with what the selected plugins add to it; see `vllm_suite.compat.scheduler`."""
    from vllm_suite.compat import scheduler

    return scheduler.make_scheduler(**{"plugins": {*scheduler.selected(), "dler"}, **kwargs})
