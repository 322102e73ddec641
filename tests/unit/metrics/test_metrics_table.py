"""The metrics table: its page is current, its names are Prometheus's, and every row of it is exported by somebody."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from vllm_suite.metrics import GROUPS
from vllm_suite.metrics.__main__ import main

ROOT = Path(__file__).parents[3]
SPECS = [(group, spec) for group in GROUPS for spec in group.specs]
SOURCES = [*(ROOT / "vllm_suite").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]


def test_the_page_is_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs/metrics.md"
    assert main(["--check", str(page)]) == 0, capsys.readouterr().err
    stale = tmp_path / "metrics.md"
    shutil.copy(page, stale)
    stale.write_text(stale.read_text().replace("Requests answered", "Requests asked"))
    assert main(["--check", str(stale)]) == 1
    assert "python -m vllm_suite.metrics" in capsys.readouterr().err
    assert main([str(stale)]) == 0
    assert stale.read_text() == page.read_text()
    assert main([str(tmp_path / "none.md")]) == 2


def test_names_are_unique_and_as_prometheus_wants_them() -> None:
    names = [spec.name for _, spec in SPECS]
    assert len(names) == len(set(names))
    for group, spec in SPECS:
        assert re.fullmatch(r"vllm_suite_[a-z0-9_]+", spec.name)
        assert spec.name.endswith("_total") == (spec.kind == "counter"), spec.name
        assert bool(spec.buckets) == (spec.kind == "histogram"), spec.name
        assert list(spec.buckets) == sorted(set(spec.buckets)), spec.name
        assert spec.help.endswith("."), spec.name
        labels = [*group.common, *spec.labels]
        assert len(labels) == len(set(labels)), spec.name
        # Those of Prometheus and of the chart's monitors; quantile is for summaries.
        assert not {"le", "quantile", "job", "fleet", "namespace"} & set(labels), spec.name


def test_every_label_says_what_it_can_hold() -> None:
    for group, spec in SPECS:
        for label in (*group.common, *spec.labels):
            assert bool(label.values) != bool(label.bound), (spec.name, label)
            assert len(label.values) == len(set(label.values)), (spec.name, label)


def test_counters_begin_with_values_that_their_labels_can_hold() -> None:
    for _, spec in SPECS:
        began = spec.from_start()
        assert len(began) == len(set(began)), spec.name
        for values in began:
            for label, value in zip(spec.labels, values, strict=True):
                assert not label.values or value in label.values, (spec.name, label, value)
        closed = all(label.values for label in spec.labels)
        assert not (closed and spec.kind == "counter") or began, spec.name


def test_every_series_is_written_by_somebody() -> None:
    """By a name that stands in the code outside the table, whole or without its group's prefix."""
    written = "\n".join(path.read_text() for path in SOURCES if "metrics" not in path.parent.parts)
    for _, spec in SPECS:
        whole = spec.name.removesuffix("_total")
        short = re.sub(r"^vllm_suite_(router|kv|ec|sched|swiftkv|roles|watch)_", "", whole)
        found = re.search(rf"""["'](?:{spec.name}|{whole}|{short}|{short}_total)["']""", written)
        assert found, f"{spec.name}: nothing writes it"
