"""``vllm-suite <verb>``: finds the verb's module and hands it the arguments.

A verb is a module ``vllm_suite.cli.<verb>`` (an underscore for each dash) with ``HELP``, ``add_arguments(parser)``
and ``run(args) -> int``.
Only the chosen verb is imported, so ``vllm-suite status`` does not pay for what ``demo`` needs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from vllm_suite import __version__

VERBS = (
    "doctor",
    "demo",
    "demo-epd",
    "up",
    "restart",
    "status",
    "top",
    "roles",
    "router",
    "swiftkv",
    "epd",
    "dler",
    "plan",
    "calibrate",
    "fleet",
)

_STATUS = "Exit status: 0 where what was asked for is true, 1 where it is not, 2 for bad arguments or files."

EXIT_BAD_ARGUMENTS = 2
EXIT_INTERRUPTED = 130


class Verb(Protocol):
    """What `main` expects of a verb's module."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it. Returns the exit status: 0 only where what was asked for is true."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: this process's). Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    # Without a verb the top-level help lists every one of them.
    names = (chosen,) if chosen in VERBS else VERBS
    args = build_parser(names).parse_args(arguments)
    try:
        return cast(int, args.run(args))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has had enough; what is left of it must not be tried again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"vllm-suite {args.verb}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1


def build_parser(names: Sequence[str] = VERBS) -> argparse.ArgumentParser:
    """A parser that knows the verbs in ``names``; importing each of them."""
    parser = argparse.ArgumentParser(
        prog="vllm-suite",
        description="Tools around a fleet of vLLM instances that run the suite's plugins.",
        epilog=_STATUS,
    )
    parser.add_argument("--version", action="version", version=f"vllm-suite {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in names:
        verb = cast(Verb, importlib.import_module(f"vllm_suite.cli.{name.replace('-', '_')}"))
        sub = verbs.add_parser(name, help=verb.HELP, description=verb.HELP, epilog=_STATUS)
        verb.add_arguments(sub)
        sub.set_defaults(run=verb.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
