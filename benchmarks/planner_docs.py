"""Runs the commands of docs/planner/plan.md and watch.md and writes what they print, fleet file and pictures into them.

python benchmarks/planner_docs.py [--check]

A command is a ``bash`` block that begins with ``vllm-suite plan`` and has a ``text`` block after it; a ``yaml`` block
after that is the fleet file, and pictures are those of its ``--html``. The windows that watch.md's command reads are
drawn here.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import re
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np

from vllm_suite.cli.main import main as vllm_suite
from vllm_suite.planner.watch import Histogram, Recorded, Window

DOCS = Path(__file__).resolve().parents[1] / "docs" / "planner"
PAGE, WATCH = DOCS / "plan.md", DOCS / "watch.md"
COMMAND = re.compile(r"```bash\nvllm-suite (plan (?:[^`])*?)\n```\n\n```text\n(.*?)```\n", re.DOTALL)
FLEET = re.compile(r"```yaml\n(# Made by vllm-suite plan.*?)```\n", re.DOTALL)
PICTURES = ("plans", "attainment", "times", "pools")


def printed(words: str) -> str:
    """What a command prints, run where its files may be written."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        vllm_suite(shlex.split(words.replace("\\\n", " ")))
    return out.getvalue()


def ran(found: re.Match[str], begin: str = "") -> str:
    """A command's blocks with what it prints now, from the first line that begins so."""
    lines = printed(found[1]).splitlines(keepends=True)
    kept = itertools.dropwhile(lambda line: not line.startswith(begin), lines)
    return found[0][: found.start(2) - found.start()] + "".join(kept) + "```\n"


def current(text: str, pictures: Path) -> tuple[str, dict[Path, str]]:
    """The page as it should be, and its pictures."""
    drawn: dict[Path, str] = {}

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        text = COMMAND.sub(ran, text)
        text = FLEET.sub(lambda found: f"```yaml\n{Path('fleet.yaml').read_text()}```\n", text)
        page = Path("report.html").read_text(encoding="utf-8")
    for name, svg in zip(PICTURES, re.findall(r"<svg.*?</svg>", page, re.DOTALL), strict=True):
        drawn[pictures / f"plan-{name}.svg"] = svg + "\n"
    return text, drawn


def record(path: Path) -> None:
    """Windows of a minute: 65 with 20 requests/s of 250 tokens, then 35 with 70 of 1,500; outputs of 90 tokens.

    Arrivals are Poisson, lengths lognormal with a coefficient of variation of 1, in vLLM's buckets.
    """
    draw = np.random.default_rng(1)
    bounds = tuple(float(digit * 10**power) for power in range(5) for digit in (1, 2, 5))

    def histogram(count: int, mean: float) -> Histogram:
        lengths = np.ceil(draw.lognormal(np.log(mean / np.sqrt(2)), np.sqrt(np.log(2)), count))
        counts, _ = np.histogram(lengths, (-np.inf, *np.nextafter(bounds, np.inf), np.inf))
        return Histogram((*bounds, np.inf), tuple(map(float, counts)), float(lengths.sum()))

    windows = []
    for minute in range(100):
        rate, prompt = (20.0, 250.0) if minute < 65 else (70.0, 1500.0)
        count = int(draw.poisson(60 * rate))
        windows.append(Window(60.0 * minute, 60.0, count, histogram(count, prompt), histogram(count, 90.0)))
    Recorded(path).write(windows)


def watched(text: str) -> str:
    """The page about watching as it should be."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        record(Path("recorded.json"))
        return COMMAND.sub(lambda found: ran(found, "at "), text)


def main() -> int:
    """0: written, or current with --check; 1: not current."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where something differs")
    args = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    text, drawn = current(before, PAGE.parent / "pictures")
    files = {PAGE: text, WATCH: watched(WATCH.read_text(encoding="utf-8")), **drawn}
    stale = [path for path, new in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != new]
    for path in stale:
        print(f"{'differs' if args.check else 'wrote'}: {path}")
        if not args.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(files[path], encoding="utf-8")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
