"""The one factory that the suite's plugins propose for ``--scheduler-cls``.

Plugin epd adds requests that only encode, plugin dler the order by length; both are mix-ins over vLLM's scheduler or
the one that runs a step ahead, whichever goes with the configuration.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore

from vllm_suite.catalog import ENV_PLUGINS, PLUGINS, parse_selection
from vllm_suite.compat.encode_only import EncodeOnlyScheduler
from vllm_suite.compat.length_policy import REPORT_METHOD
from vllm_suite.compat.length_scheduler import LengthAwareScheduler


def selected() -> tuple[str, ...]:
    """The plugins that are selected in this process."""
    return parse_selection(os.environ.get(ENV_PLUGINS, ""))


def make_scheduler(
    *,
    vllm_config: Any,
    plugins: Collection[str] | None = None,
    clock: Callable[[], float] | None = None,
    **kwargs: Any,
) -> Scheduler:
    """For ``--scheduler-cls``: vLLM's scheduler with what the plugins add to it.

    Args:
        plugins: names from the catalog; those selected in this process where None.
        clock: seconds, as `Request.arrival_time` is stamped; the wall clock where None. For simulations.
    """
    names = selected() if plugins is None else plugins
    mixins: tuple[type[Any], ...] = ()
    if "dler" in names:
        mixins = (LengthAwareScheduler,)
        make_policy = PLUGINS["dler"].length_policy
        assert make_policy is not None
        kwargs["length_policy"] = functools.partial(make_policy.load(), **({"clock": clock} if clock else {}))
        install_report()
    if "epd" in names:
        mixins += (EncodeOnlyScheduler,)
    base = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    return compose(mixins, base)(vllm_config=vllm_config, **kwargs)


@functools.cache
def compose(mixins: tuple[type[Any], ...], base: type[Any]) -> type[Any]:
    """One class of the mix-ins over ``base``; asked again, the same."""
    name = "".join(mixin.__name__.removesuffix("Scheduler") for mixin in mixins) + base.__name__
    return type(name, (*mixins, base), {"__module__": __name__}) if mixins else base


def install_report() -> None:
    """Let API servers ask this engine's scheduler what it counted, by a call of vLLM's utility channel."""
    setattr(EngineCore, REPORT_METHOD, _report)


def _report(core: Any) -> dict[str, Any]:
    policy = getattr(core.scheduler, "length_policy", None)
    answer: dict[str, Any] = policy.report() if policy is not None else {}
    return answer
