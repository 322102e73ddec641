"""Keys: where they come from and how they are compared."""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from pydantic import SecretStr

from vllm_suite.router.config import Auth


class KeyFileError(ValueError):
    """A key file cannot be read or holds no key, or a variable for one is empty."""


def key_lines(path: Path) -> list[str]:
    """The keys in a file, one a line, comments left out. Raises `KeyFileError`."""
    try:
        keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as exc:
        raise KeyFileError(f"key file {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise KeyFileError(f"key file {path} is not UTF-8 text") from exc
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise KeyFileError(f"key file {path} holds no key")
    return keys


def _one(secret: SecretStr | None, path: Path | None, env: str | None) -> str | None:
    if secret is not None:
        return secret.get_secret_value()
    if path is not None:
        return key_lines(path)[0]
    return env or None


def _digests(keys: Iterable[str]) -> tuple[bytes, ...]:
    # Equal lengths make the comparison independent of the key's length too.
    return tuple(sha256(key.encode()).digest() for key in keys)


@dataclass(frozen=True, slots=True)
class Keys:
    """Resolved keys. Client and control keys are kept as digests only."""

    client: tuple[bytes, ...]
    control: tuple[bytes, ...]
    upstream_header: str | None = field(repr=False)
    state_header: str | None = field(repr=False)

    @staticmethod
    def resolve(auth: Auth, environ: Mapping[str, str] = os.environ) -> Keys:
        """Collect the keys from settings, files and environment. Raises `KeyFileError`."""
        for name in ("VLLM_SUITE_API_KEY", "VLLM_SUITE_CONTROL_KEY"):
            if environ.get(name) == "":
                # A Secret without that entry, most likely: to go on without a key would open what it was to close.
                raise KeyFileError(f"{name} is set and empty; unset it where no key is wanted")
        client = [key.get_secret_value() for key in auth.api_keys]
        if auth.api_key_file is not None:
            client += key_lines(auth.api_key_file)
        if environ.get("VLLM_SUITE_API_KEY"):
            client.append(environ["VLLM_SUITE_API_KEY"])
        upstream = _one(auth.upstream_api_key, auth.upstream_api_key_file, environ.get("VLLM_SUITE_UPSTREAM_API_KEY"))
        control = _one(auth.control_key, auth.control_key_file, environ.get("VLLM_SUITE_CONTROL_KEY"))
        state = control or upstream
        return Keys(
            client=_digests(client),
            control=_digests([control] if control else client),
            upstream_header=f"Bearer {upstream}" if upstream else None,
            state_header=f"Bearer {state}" if state else None,
        )


def allowed(authorization: str | None, digests: tuple[bytes, ...]) -> bool:
    """True when no key is set or the header carries one of them; constant time over the keys."""
    if not digests:
        return True
    if authorization is None:
        return False
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() != "bearer":
        return False
    given = sha256(key.encode("utf-8", "surrogateescape")).digest()
    match = False
    for digest in digests:
        match |= hmac.compare_digest(given, digest)
    return match
