"""`vllm-suite epd <verb>`: finds the verb's module and hands it the arguments.

A verb is a module with ``add_arguments(parser)`` and ``run(args) -> int``; only the chosen one is imported.
`vllm_suite.cli.epd` calls this module by name, since the suite imports no plugin.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Protocol, cast

VERBS: dict[str, tuple[str, str]] = {
    "memory": ("vllm_epd.memory_cli", "what each kind of instance holds, from a config, beside the paper's tables"),
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
    parser.add_argument("epd_verb", choices=VERBS, metavar="VERB", help="one of the verbs below")
    parser.add_argument("epd_arguments", nargs=argparse.REMAINDER, metavar="...", help="VERB --help lists them")


def run(args: argparse.Namespace) -> int:
    """Parse the verb's arguments and run it. Exits with 2 on bad arguments, as argparse does."""
    name, text = VERBS[args.epd_verb]
    try:
        verb = cast(Verb, importlib.import_module(name))
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        sys.stderr.write(f"vllm-suite epd {args.epd_verb}: error: not part of this version\n")
        return 2
    parser = argparse.ArgumentParser(prog=f"vllm-suite epd {args.epd_verb}", description=text)
    verb.add_arguments(parser)
    return verb.run(parser.parse_args(args.epd_arguments))
