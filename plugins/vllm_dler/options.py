"""From the plugin's settings to vLLM's own options; see :mod:`vllm_suite.compat.settings`."""

from __future__ import annotations

from vllm_dler.config import SchedulerSettings
from vllm_suite.compat.settings import Note, Setting, View

SCHEDULER = "vllm_suite.compat.scheduler.make_scheduler"
OWN_SCHEDULER = "vllm_dler.scheduler.make_scheduler"


def propose(view: View) -> list[Setting | Note]:
    """The scheduler. Raises SelectionError for settings that are wrong."""
    settings = SchedulerSettings.of(view.engine_args)
    if view.role == "encode":
        return [Note("dler: an instance of role encode generates nothing, its scheduler is left alone")]
    unit = " s/token" if settings.rule == "kappa" else ""
    how = f"{settings.rule} {settings.worth:g}{unit}" + ("" if settings.reorders else ": vLLM's own order")
    return [Setting("scheduler_cls", SCHEDULER, f"dler, {how}")]


def check(view: View) -> None:
    """Refuse what the scheduler cannot work with."""
