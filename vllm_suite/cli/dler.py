"""`vllm-suite dler VERB`: the tools of the DLER plugin."""

from __future__ import annotations

from vllm_suite.cli.subverbs import Subverbs

HELP = "train models to think shorter, and merge what they learned"
VERBS: dict[str, tuple[str, str]] = {
    "train": ("vllm_dler.train.cli", "shorten a reasoning model's answers by reinforcement learning (DLER)"),
    "merge": ("vllm_dler.merge.cli", "put the largest updates of a trained model back onto its base"),
}

_SUBVERBS = Subverbs("dler", VERBS)
add_arguments, run = _SUBVERBS.add_arguments, _SUBVERBS.run
