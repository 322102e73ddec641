"""`vllm-suite dler <verb>`: the tools of the DLER plugin, found by name because the suite imports no plugin.

A verb is a module with ``add_arguments(parser)`` and ``run(args) -> int``; only the chosen one is imported.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Protocol, cast

HELP = "train models to think shorter, and merge what they learned"
VERBS: dict[str, tuple[str, str]] = {
    "train": ("vllm_dler.train.cli", "shorten a reasoning model's answers by reinforcement learning (DLER)"),
    "merge": ("vllm_dler.merge.cli", "put the largest updates of a trained model back onto its base"),
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
    parser.add_argument("dler_verb", choices=VERBS, metavar="VERB", help="one of the verbs below")
    parser.add_argument("dler_arguments", nargs=argparse.REMAINDER, metavar="...", help="VERB --help lists them")


def run(args: argparse.Namespace) -> int:
    """Parse the verb's arguments and run it. Exits with 2 on bad arguments, as argparse does."""
    name, text = VERBS[args.dler_verb]
    try:
        verb = cast(Verb, importlib.import_module(name))
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        sys.stderr.write(f"vllm-suite dler {args.dler_verb}: error: not part of this version\n")
        return 2
    parser = argparse.ArgumentParser(prog=f"vllm-suite dler {args.dler_verb}", description=text)
    verb.add_arguments(parser)
    return verb.run(parser.parse_args(args.dler_arguments))
