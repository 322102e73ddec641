"""What the suite takes from inside vLLM, one row per name, and the check that it is still so.

A row says where a name is, what it is, which parameters it has where the suite relies on them, why it is used and
in which supported versions it holds. `check` walks the rows over a source tree with no import of vLLM, so a
version that cannot be installed here can be checked as well::

    python -m vllm_suite.compat.contracts                      # the installed vLLM
    python -m vllm_suite.compat.contracts --source DIR --series 0.33   # DIR holds the package folder vllm/
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_suite.compat.versions import SUPPORTED, installed_version, series

Kind = Literal[
    "module",
    "class",
    "function",
    "method",
    "classmethod",
    "staticmethod",
    "property",
    "attribute",
    "instance",
    "literal",
]


@dataclass(frozen=True)
class Contract:
    """One name that the suite uses.

    ``path`` is ``"pkg.mod"``, ``"pkg.mod:name"`` or ``"pkg.mod:Class.name"``. ``kind`` is ``attribute`` for what
    a class or module body defines (a dataclass field too), ``instance`` for what a method assigns to ``self``, and
    ``literal`` for a string that must occur in the module (``value``).

    ``params`` are all parameter names in order, ``self`` included, variadic ones with their stars; None where no
    call depends on them. With ``more`` further parameters may follow or lie between. ``value`` is what an
    attribute must be set to. ``versions`` are the release series in which the row holds.
    """

    path: str
    kind: Kind
    why: str
    params: tuple[str, ...] | None = None
    more: bool = False
    value: Any = None
    versions: tuple[str, ...] = SUPPORTED

    @property
    def module(self) -> str:
        """The module part of ``path``."""
        return self.path.partition(":")[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The parts behind the colon; empty for a module."""
        rest = self.path.partition(":")[2]
        return tuple(rest.split(".")) if rest else ()


def table() -> tuple[Contract, ...]:
    """Every row, in the order of the modules that hold them."""
    from vllm_suite.compat import (
        contract_calibrate,
        contract_core,
        contract_disagg,
        contract_dler,
        contract_encode,
        contract_epd,
        contract_models,
        contract_swiftkv,
    )

    modules = (
        contract_calibrate,
        contract_core,
        contract_disagg,
        contract_dler,
        contract_encode,
        contract_epd,
        contract_models,
        contract_swiftkv,
    )
    return tuple(row for module in modules for row in module.ROWS)


def rows_for(version_series: str, rows: Iterable[Contract] | None = None) -> tuple[Contract, ...]:
    """The rows that hold in one release series, for example ``"0.32"``."""
    return tuple(row for row in (table() if rows is None else rows) if version_series in row.versions)


def check(root: Path, rows: Iterable[Contract]) -> list[str]:
    """One line per row that does not hold in the source tree ``root`` (the folder that holds ``vllm/``)."""
    from vllm_suite.compat.contract_source import SourceTree

    tree = SourceTree(root)
    return [f"{row.path}: {problem}" for row in rows if (problem := tree.problem(row)) is not None]


def installed_root() -> Path | None:
    """The folder that holds the installed ``vllm`` package; None where there is none. Does not import it."""
    spec = importlib.util.find_spec("vllm")
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))).parent if places else None


def main(argv: Sequence[str] | None = None) -> int:
    """Print what does not hold; 0 where everything does, 2 where there is nothing to check."""
    parser = argparse.ArgumentParser(prog="python -m vllm_suite.compat.contracts", description=__doc__)
    parser.add_argument("--source", type=Path, help="folder that holds vllm/ (default: the installed one)")
    parser.add_argument("--series", choices=SUPPORTED, help="release series (default: the installed one's)")
    args = parser.parse_args(argv)
    root = args.source or installed_root()
    version = args.series or series(installed_version() or "")
    if root is None or not (root / "vllm").is_dir() or version not in SUPPORTED:
        sys.stderr.write("no supported vLLM to check; give --source and --series\n")
        return 2
    rows = rows_for(version)
    problems = check(root, rows)
    sys.stdout.write("\n".join([*problems, f"vLLM {version}: {len(rows)} rows, {len(problems)} broken"]) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
