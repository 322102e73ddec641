"""How long NIXL's progress thread sleeps. Imports no vLLM: an agent can be made where there is no engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


# ### PATCH START: nixl._api.nixlBind.nixlAgentConfig
# Why: NIXL's Python API sets pthrDelay = 0 with no argument or variable to change it, which makes the UCX progress
# thread call poll(fds, 0) for ever: 47-86 % of a core per idle worker on the CPU platform. The value is the sleep
# between polls; traffic wakes the thread through its file descriptors whatever it is.
# Remove when: nixl_agent_config takes the delay.
def quiet_progress_thread(delay_us: int) -> None:
    """Make NIXL agents created from now on in this process sleep ``delay_us`` microseconds between polls."""
    import nixl._api as api

    upstream: Any = api.nixlBind.nixlAgentConfig
    base = getattr(upstream, "_suite_base", upstream)

    class AgentConfig(base):  # type: ignore[misc, valid-type]
        _suite_base = base

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "pthrDelay" and value == 0:
                value = delay_us
            base.__setattr__(self, name, value)

    api.nixlBind.nixlAgentConfig = AgentConfig


@contextlib.contextmanager
def quiet_agents(delay_us: int) -> Iterator[None]:
    """As `quiet_progress_thread`, for the agents created inside the ``with`` block only."""
    import nixl._api as api

    before = api.nixlBind.nixlAgentConfig
    quiet_progress_thread(delay_us)
    try:
        yield
    finally:
        api.nixlBind.nixlAgentConfig = before


# ### PATCH END
