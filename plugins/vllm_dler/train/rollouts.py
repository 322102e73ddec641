"""Dynamic sampling: round after round of answers, until enough groups teach something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from vllm_dler.train.grading import TrainError
from vllm_dler.train.recipe import informative


@dataclass
class Chosen:
    """Which groups a step trains on.

    Attributes:
        groups: their numbers, over all rounds of the step in order.
        rounds: rounds that were sampled.
        sampled: groups that were sampled.
        informative: of those, the ones whose rewards differ.
        surplus: informative groups that the step had no room for.
        filled: groups among ``groups`` that teach nothing.
        all_right, all_wrong: sampled groups whose rewards are all above zero and the same, and all zero.
    """

    groups: list[int] = field(default_factory=list)
    rounds: int = 0
    sampled: int = 0
    informative: int = 0
    surplus: int = 0
    filled: int = 0
    all_right: int = 0
    all_wrong: int = 0


def choose(
    sample: Callable[[], Tensor], group: int, want: int, *, dynamic: bool, max_rounds: int, stop_short: bool = False
) -> Chosen:
    """Sample until ``want`` groups are informative, and take the first ``want`` of those.

    Args:
        sample: makes one round and returns its rewards, [groups * group], the same on every process.
        dynamic: False takes the one round as it is.
        max_rounds: after these the rest is filled with groups that are not informative.
        stop_short: raise TrainError in place of filling.
    """
    out = Chosen()
    idle: list[int] = []
    while True:
        reward = sample()
        useful = informative(reward, group).tolist()
        best = reward.view(-1, group).amax(1).tolist()
        for good, top in zip(useful, best, strict=True):
            if good:
                out.informative += 1
            elif top > 0:
                out.all_right += 1
            else:
                out.all_wrong += 1
            (out.groups if good or not dynamic else idle).append(out.sampled)
            out.sampled += 1
        out.rounds += 1
        if len(out.groups) >= want or not dynamic or out.rounds == max_rounds:
            break
    missing = want - len(out.groups)
    if missing > 0:
        if stop_short:
            raise TrainError(
                f"{out.rounds} rounds gave {out.informative} of {want} groups with both right and wrong answers "
                f"({out.all_right} all right, {out.all_wrong} all wrong): change the data, max_tokens or max_rounds"
            )
        out.groups += idle[:missing]
        out.filled = missing
    elif dynamic:
        out.surplus = -missing
    out.groups = out.groups[:want]
    return out
