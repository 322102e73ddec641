"""The keys of a fleet in plain text, for the processes that have to send them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import SecretStr

from vllm_suite.router.auth import key_lines
from vllm_suite.router.config import Auth

ENV_CLIENT_KEY = "VLLM_SUITE_API_KEY"
ENV_UPSTREAM_KEY = "VLLM_SUITE_UPSTREAM_API_KEY"
ENV_CONTROL_KEY = "VLLM_SUITE_CONTROL_KEY"
ENV_VLLM_KEY = "VLLM_API_KEY"


@dataclass(frozen=True)
class FleetKeys:
    """None where no key is asked for. The settings come first, then a file's first key, then the environment."""

    client: str | None = field(default=None, repr=False)
    upstream: str | None = field(default=None, repr=False)
    control: str | None = field(default=None, repr=False)

    @staticmethod
    def resolve(auth: Auth, environ: Mapping[str, str] = os.environ) -> FleetKeys:
        """Collect them. Raises KeyFileError where a file cannot be read or holds no key."""
        first = auth.api_keys[0] if auth.api_keys else None
        # Instances inherit vLLM's own variable and then ask for that key, so the router has to send it.
        sent = environ.get(ENV_UPSTREAM_KEY) or environ.get(ENV_VLLM_KEY)
        return FleetKeys(
            client=_key(first, auth.api_key_file, environ.get(ENV_CLIENT_KEY)),
            upstream=_key(auth.upstream_api_key, auth.upstream_api_key_file, sent),
            control=_key(auth.control_key, auth.control_key_file, environ.get(ENV_CONTROL_KEY)),
        )

    @property
    def instance_control(self) -> str | None:
        """Opens /suite/v1 on an instance."""
        return self.control or self.upstream

    @property
    def router_control(self) -> str | None:
        """Opens /suite/v1 on the router."""
        return self.control or self.client


def _key(secret: SecretStr | None, path: Path | None, env: str | None) -> str | None:
    if secret is not None:
        return secret.get_secret_value()
    if path is None:
        return env or None
    return key_lines(path)[0]
