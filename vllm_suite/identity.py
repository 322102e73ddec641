"""Who this instance is: a stable id, an epoch that is new at every start, and a role.

The main process of an instance (the one that multiprocessing did not start) draws the epoch; its children
inherit it through the environment. A restarted instance therefore has the same id and another epoch, which is
how peers and the router tell that what they remember of it is stale.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import socket
import sys
from dataclasses import dataclass
from typing import Literal, get_args

Role = Literal["prefill", "decode", "encode", "any"]
ROLES: tuple[Role, ...] = get_args(Role)

ENV_INSTANCE_ID = "VLLM_SUITE_INSTANCE_ID"
ENV_EPOCH = "VLLM_SUITE_EPOCH"
ENV_ROLE = "VLLM_SUITE_ROLE"
# The id that the main process derived where the operator gave none. Kept apart from ENV_INSTANCE_ID so that an
# unrelated server started from this one does not take it for an operator's choice.
ENV_DERIVED_ID = "VLLM_SUITE_DERIVED_ID"

_started = False  # this process, or the one it was forked from, has drawn the epoch


@dataclass(frozen=True)
class Identity:
    """``instance_id`` outlives a restart, ``epoch`` (16 hex digits) does not."""

    instance_id: str
    epoch: str
    role: Role


def identity() -> Identity:
    """The identity of this process's instance; the same in all of its processes.

    Raises ValueError where ``VLLM_SUITE_ROLE`` is not a role.
    """
    _start_once()
    instance_id = os.environ.get(ENV_INSTANCE_ID) or os.environ[ENV_DERIVED_ID]
    return Identity(instance_id=instance_id, epoch=os.environ[ENV_EPOCH], role=role())


def role() -> Role:
    """The role the operator gave (``any`` where none). Raises ValueError for any other word."""
    text = os.environ.get(ENV_ROLE) or "any"
    if text not in ROLES:
        raise ValueError(f"{ENV_ROLE}={text!r} is not a role; roles: {', '.join(ROLES)}")
    return text


def use_port(port: int | None) -> None:
    """Derive the default id from the API port, which only the main process knows.

    Call before children start. Has no effect where the operator named the instance or no port is used.
    """
    _start_once()
    if port:
        os.environ[ENV_DERIVED_ID] = f"{socket.gethostname()}:{port}"


def _start_once() -> None:
    global _started
    if _started:
        return
    _started = True
    if not _is_main_process() and ENV_EPOCH in os.environ and ENV_DERIVED_ID in os.environ:
        return
    # Values found in the main process were left by whoever started it; they name another life.
    os.environ[ENV_EPOCH] = secrets.token_hex(8)
    os.environ[ENV_DERIVED_ID] = f"{socket.gethostname()}-{os.getpid()}"


def _is_main_process() -> bool:
    if multiprocessing.parent_process() is not None:
        return False
    # Ray starts workers as plain programs; they belong to the instance whose environment Ray gave them.
    return not any(os.path.basename(arg) == "default_worker.py" for arg in sys.orig_argv)
