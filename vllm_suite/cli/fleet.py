"""`vllm-suite fleet VERB`: what is made from the fleet file's model."""

from __future__ import annotations

from vllm_suite.cli.subverbs import Subverbs

HELP = "the Helm chart's schema, from the fleet file's"
VERBS: dict[str, tuple[str, str]] = {
    "schema": ("vllm_suite.fleet.schema", "JSON schema and default values of the chart"),
}

_SUBVERBS = Subverbs("fleet", VERBS)
add_arguments, run = _SUBVERBS.add_arguments, _SUBVERBS.run
