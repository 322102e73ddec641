"""`vllm-suite swiftkv <verb>`: finds the verb's module and hands it the arguments.

A verb is a module with ``add_arguments(parser)`` and ``run(args) -> int``; only the chosen one is imported.
`vllm_suite.cli.swiftkv` calls this module by name, since the suite imports no plugin.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Protocol, cast

VERBS: dict[str, tuple[str, str]] = {
    "convert": ("vllm_swiftkv.convert.cli", "make a SwiftKV checkpoint of an ordinary one"),
    "distill": ("vllm_swiftkv.distill.cli", "train a converted checkpoint to answer as the ordinary model does"),
    "sizes": ("vllm_swiftkv.sizes_cli", "weights and KV cache of each kind of instance, from a config"),
    "eval": ("vllm_swiftkv.evaluate_cli", "measure the quality of a checkpoint with lm-evaluation-harness"),
}


class Verb(Protocol):
    """What `run` expects of a verb's module."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it. Returns the exit status."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb; what follows it is parsed once its module is known."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "verbs:\n" + "\n".join(f"  {name:10}{text}" for name, (_, text) in VERBS.items())
    parser.add_argument("swiftkv_verb", choices=VERBS, metavar="VERB", help="one of the verbs below")
    parser.add_argument("swiftkv_arguments", nargs=argparse.REMAINDER, metavar="...", help="VERB --help lists them")


def run(args: argparse.Namespace) -> int:
    """Parse the verb's arguments and run it. Exits with 2 on bad arguments, as argparse does."""
    name, text = VERBS[args.swiftkv_verb]
    try:
        verb = cast(Verb, importlib.import_module(name))
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        sys.stderr.write(f"vllm-suite swiftkv {args.swiftkv_verb}: error: not part of this version\n")
        return 2
    parser = argparse.ArgumentParser(prog=f"vllm-suite swiftkv {args.swiftkv_verb}", description=text)
    verb.add_arguments(parser)
    return verb.run(parser.parse_args(args.swiftkv_arguments))
