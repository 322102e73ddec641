"""`vllm-suite PLUGIN VERB`: the tools of a plugin, found by name because the suite imports no plugin."""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass
from typing import Protocol, cast


class Verb(Protocol):
    """What a verb's module has."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it. Returns the exit status."""


@dataclass(frozen=True)
class Subverbs:
    """The verbs of one plugin: module and one line of help by name. Only the chosen one is imported."""

    plugin: str
    verbs: dict[str, tuple[str, str]]

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb; what follows it is parsed once its module is known."""
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = "verbs:\n" + "\n".join(f"  {name:10}{text}" for name, (_, text) in self.verbs.items())
        parser.add_argument("subverb", choices=self.verbs, metavar="VERB", help="one of the verbs below")
        parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="VERB --help lists them")

    def run(self, args: argparse.Namespace) -> int:
        """Parse the verb's arguments and run it. Exits with 2 on bad arguments, as argparse does."""
        program = f"vllm-suite {self.plugin} {args.subverb}"
        name, text = self.verbs[args.subverb]
        try:
            verb = cast(Verb, importlib.import_module(name))
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                raise
            sys.stderr.write(f"{program}: error: not part of this version\n")
            return 2
        parser = argparse.ArgumentParser(prog=program, description=text)
        verb.add_arguments(parser)
        return verb.run(parser.parse_args(args.arguments))
