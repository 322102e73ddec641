"""Write the tables of docs/metrics.md, or say that they are stale."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_suite.metrics.page import MARK, tables


def main(argv: list[str] | None = None) -> int:
    """0: written, or current with --check; 1: not current; 2: no such page."""
    parser = argparse.ArgumentParser(prog="python -m vllm_suite.metrics", description=__doc__)
    parser.add_argument("page", nargs="?", type=Path, default=Path("docs/metrics.md"))
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where it is not current")
    args = parser.parse_args(argv)
    try:
        old = args.page.read_text(encoding="utf-8")
    except OSError as error:
        print(f"{args.page}: {error.strerror}; run this in the repository, or name the page", file=sys.stderr)
        return 2
    head, mark, _ = old.partition(MARK)
    if not mark:
        print(f"{args.page}: no line {MARK.strip()}, below which the tables go", file=sys.stderr)
        return 2
    new = head + MARK + "\n" + tables()
    if args.check:
        if old != new:
            print(f"{args.page} is not current; run: python -m vllm_suite.metrics", file=sys.stderr)
        return int(old != new)
    args.page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
