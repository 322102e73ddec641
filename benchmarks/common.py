"""What the benchmarks of the KV path share: arguments, tables, result files, and two engines to measure on."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_suite.provenance import provenance

# The harness that forks two in-process engines is the engine tests' own.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "engine"))


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options every benchmark has; argparse exits 2 on bad arguments."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result, with versions and commit, here")
    parser.add_argument("--quick", action="store_true", help="few repetitions: shows that it runs, not what it costs")
    return parser


def positive(text: str) -> int:
    """Argument type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def write_result(path: Path | None, benchmark: str, result: dict[str, Any], load_before: Sequence[float]) -> None:
    """Write one result with its provenance; does nothing where no file was asked for.

    Args:
        load_before: load averages at the start. Other work on the machine shows as a load above the benchmark's own.
    """
    if path is None:
        return
    load = {"load_average_before": list(load_before), "load_average_after": list(os.getloadavg())}
    body = {"benchmark": benchmark, **result, **load, "provenance": provenance()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=2) + "\n")
    print(f"wrote {path}")


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A rich table on a terminal, aligned plain lines elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title)
        for index, name in enumerate(columns):
            table.add_column(name, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]
    print(f"\n{title}")
    for line in [columns, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def size_text(size: int) -> str:
    """Bytes as KiB or MiB."""
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes, quartiles and the number of samples."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "p25": low,
        "p75": high,
        "samples": len(values),
    }


@contextlib.contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """A folder for checkpoints and logs that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        yield Path(folder)


def transfer_config(connector: str, role: str, extra: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """``--kv-transfer-config`` for a connector class by name.

    Args:
        connector: ``SuiteNixlConnector``, ``QuietNixlConnector`` (of this folder), or one of vLLM's own.
        role: ``kv_producer`` or ``kv_consumer``.
    """
    modules = {"SuiteNixlConnector": "vllm_disagg.connector", "QuietNixlConnector": "quiet_stock"}
    config: dict[str, Any] = {
        "kv_connector": connector,
        "kv_role": role,
        "kv_buffer_device": "cpu",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra or {},
        **more,
    }
    if connector in modules:
        config["kv_connector_module_path"] = modules[connector]
    return config
