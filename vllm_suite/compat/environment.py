"""Tell vLLM that the suite's environment variables are meant, so that it does not warn about each of them."""

from __future__ import annotations

import os

PREFIX = "VLLM_SUITE_"


def declare() -> None:
    """Add every ``VLLM_SUITE_*`` variable that is set to vLLM's table of known ones.

    vLLM warns about unknown ``VLLM_*`` names (or stops, with ``--fail-on-environ-validation``). The getters
    return None: vLLM hashes their values into the torch.compile cache key, and an epoch must not be in it.
    """
    ours = [name for name in os.environ if name.startswith(PREFIX)]
    if ours:
        import vllm.envs as envs

        envs.environment_variables.update((name, lambda: None) for name in ours)
