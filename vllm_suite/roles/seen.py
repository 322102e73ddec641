"""One instance at a look of the controller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_suite.identity import Role
from vllm_suite.roles.state import STAGES, serves


@dataclass(frozen=True)
class Work:
    """Counts since the instance started.

    Attributes:
        arrived: requests let in, by stage; `unknown` where they did not say.
        finished: requests, with their `prompt_tokens` and `output_tokens`.
        generated: output tokens, those of unfinished requests among them.
    """

    arrived: Mapping[str, int]
    finished: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    generated: int = 0


@dataclass(frozen=True)
class Seen:
    """`epoch` and `role_epoch` are what a switch has to name. `work` is None where the instance does not tell."""

    instance_id: str
    url: str
    epoch: str
    role: Role
    role_epoch: int
    phase: str
    ready: bool
    can: tuple[str, ...]
    queue: int
    running: int
    work: Work | None = None


def others_take(fleet: Sequence[Seen], one: Seen) -> bool:
    """Whether every stage that an instance serves is served by another one that is ready."""
    others = [other for other in fleet if other.instance_id != one.instance_id and other.ready]
    # What one of role `any` encodes for others does not go back.
    stages = [stage for stage in STAGES if serves(one.role, stage) and (stage != "encode" or one.role == "encode")]
    return all(any(other.phase == "serving" and serves(other.role, stage) for other in others) for stage in stages)
