"""`vllm-suite swiftkv VERB`: the tools of the SwiftKV plugin."""

from __future__ import annotations

from vllm_suite.cli.subverbs import Subverbs

HELP = "make, train and evaluate SwiftKV checkpoints"
VERBS: dict[str, tuple[str, str]] = {
    "convert": ("vllm_swiftkv.convert.cli", "make a SwiftKV checkpoint of an ordinary one"),
    "distill": ("vllm_swiftkv.distill.cli", "train a converted checkpoint to answer as the ordinary model does"),
    "sizes": ("vllm_swiftkv.sizes_cli", "weights and KV cache of each kind of instance, from a config"),
    "eval": ("vllm_swiftkv.evaluate_cli", "measure the quality of a checkpoint with lm-evaluation-harness"),
}

_SUBVERBS = Subverbs("swiftkv", VERBS)
add_arguments, run = _SUBVERBS.add_arguments, _SUBVERBS.run
