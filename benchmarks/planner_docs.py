"""Runs the commands of docs/planner/plan.md and writes what they print, their fleet file and pictures into it.

python benchmarks/planner_docs.py [--check]

A command is a ``bash`` block that begins with ``vllm-suite plan`` and has a ``text`` block after it; a ``yaml`` block
after that is the fleet file, and pictures are those of its ``--html``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

from vllm_suite.cli.main import main as vllm_suite

PAGE = Path(__file__).resolve().parents[1] / "docs" / "planner" / "plan.md"
COMMAND = re.compile(r"```bash\nvllm-suite (plan (?:[^`])*?)\n```\n\n```text\n(.*?)```\n", re.DOTALL)
FLEET = re.compile(r"```yaml\n(# Made by vllm-suite plan.*?)```\n", re.DOTALL)
PICTURES = ("plans", "attainment", "times", "pools")


def printed(words: str) -> str:
    """What a command prints, run where its files may be written."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        vllm_suite(shlex.split(words.replace("\\\n", " ")))
    return out.getvalue()


def current(text: str, pictures: Path) -> tuple[str, dict[Path, str]]:
    """The page as it should be, and its pictures."""
    drawn: dict[Path, str] = {}

    def run(found: re.Match[str]) -> str:
        return found[0].replace(found[2], printed(found[1]))

    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            text = COMMAND.sub(run, text)
            text = FLEET.sub(lambda found: f"```yaml\n{Path('fleet.yaml').read_text()}```\n", text)
            page = Path("report.html").read_text(encoding="utf-8")
        finally:
            os.chdir(home)
    for name, svg in zip(PICTURES, re.findall(r"<svg.*?</svg>", page, re.DOTALL), strict=True):
        drawn[pictures / f"plan-{name}.svg"] = svg + "\n"
    return text, drawn


def main() -> int:
    """0: written, or current with --check; 1: not current."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where something differs")
    args = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    text, drawn = current(before, PAGE.parent / "pictures")
    files = {PAGE: text, **drawn}
    stale = [path for path, new in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != new]
    for path in stale:
        print(f"{'differs' if args.check else 'wrote'}: {path}")
        if not args.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(files[path], encoding="utf-8")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
