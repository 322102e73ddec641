"""`vllm-suite epd VERB`: the tools of the encoder-stage plugin."""

from __future__ import annotations

from vllm_suite.cli.subverbs import Subverbs

HELP = "sizes of encoder, prefill and monolithic instances"
VERBS: dict[str, tuple[str, str]] = {
    "memory": ("vllm_epd.memory_cli", "what each kind of instance holds, from a config, beside the paper's tables"),
}

_SUBVERBS = Subverbs("epd", VERBS)
add_arguments, run = _SUBVERBS.add_arguments, _SUBVERBS.run
