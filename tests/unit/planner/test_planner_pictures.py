"""Pictures and the page: that they show what they are given, and need nothing else."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from simulated import ExactSource

from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import load
from vllm_suite.planner.outcome import Collector
from vllm_suite.planner.plan import Plan, PoolPlan, Slo
from vllm_suite.planner.report import pictures
from vllm_suite.planner.report.page import Section, page
from vllm_suite.planner.report.series import BINS, PoolSeries
from vllm_suite.planner.simulator.fleet import simulate_plan
from vllm_suite.planner.simulator.setting import Setting
from vllm_suite.planner.traces import Workload

MODEL, QUANT = load("meta-llama/Llama-3.1-8B")
SETTING = Setting(MODEL, QUANT, cluster("3xH100-SXM"), lambda pool: ExactSource(0.01, 1e-5, key=1e-8))
APART = Plan((PoolPlan("prefill", 1), PoolPlan("decode", 2)))
SLO = Slo(0.05, 0.02)


@pytest.fixture(scope="module")
def run() -> tuple[Collector, PoolSeries, tuple[tuple[float, ...], ...]]:
    collector, series = Collector(SLO), PoolSeries(APART)
    found = simulate_plan(APART, SETTING, Workload.synthetic(400, 40, cv=0.5).requests(20.0, 300), collector,
                          observer=series)  # fmt: skip
    return collector, series, tuple(pool.busy for pool in found.pools.values())


Run = tuple[Collector, PoolSeries, tuple[tuple[float, ...], ...]]


def test_series_hold_all_time_in_steps(run: Run) -> None:
    _, series, busy = run
    for index, role in enumerate(("prefill", "decode")):
        middles, shares = series.of(role)
        assert len(middles) <= BINS
        assert middles[1] - middles[0] == pytest.approx(series.width)
        engines = APART.pools[index].count
        assert (shares[:2].sum() * series.width * engines) == pytest.approx(sum(busy[index]))
        assert shares[:2].sum(axis=0).max() <= 1 + 1e-9
    # Prefill computes prompts alone, decode prompts of one token and more.
    assert series.of("prefill")[1][1].sum() == 0
    assert series.of("decode")[1][1].sum() > 0
    # It grew from 10 ms bins.
    assert series.width > 0.01


def test_every_picture_is_drawn_and_says_what_it_shows(run: Run) -> None:
    collector, series, _ = run
    marks = [pictures.Mark("2 any", 3.0, 1.0, True), pictures.Mark("1 prefill | 1 decode", 4.0, 2.0, True),
             pictures.Mark("worse", 2.0, 3.0)]  # fmt: skip
    steps = [pictures.Step(rate, share, share - 0.02, min(1, share + 0.02)) for rate, share in ((1, 1.0), (3, 0.5))]
    drawn = {
        "pareto": (pictures.pareto(marks, "goodput (requests/s)", "latency (s)"), ("2 any", "goodput (requests/s)")),
        "attainment": (pictures.attainment({"2 any": steps}, 0.9), ("2 any", "asked for: 90%")),
        "distributions": (pictures.distributions({"apart": collector}, SLO), ("TTFT (ms)", "TPOT (ms)", "apart")),
        "pools": (pictures.pools(series), ("prefill", "decode", "sequences")),
    }
    for name, (figure, words) in drawn.items():
        text = pictures.svg(figure)
        root = ElementTree.fromstring(text)
        assert root.tag.endswith("svg"), name
        said = " ".join(element.text or "" for element in root.iter() if element.tag.endswith("}text"))
        for word in words:
            assert word in said, (name, word, said)
    assert "worse" not in pictures.svg(drawn["pareto"][0])
    curve = drawn["attainment"][0].axes[0].lines[0]
    assert np.allclose(curve.get_xydata(), [(1, 1.0), (3, 0.5)])
    for axes, metric in zip(drawn["distributions"][0].axes, ("ttft", "tpot"), strict=True):
        values, below = (np.asarray(each) for each in axes.lines[0].get_data())
        part = collector.window()
        median = collector.tally.quantile(metric, 0.5, part.begin, part.end)
        assert np.interp(0.5, below, values) == pytest.approx(1e3 * median, rel=0.02)
    shares = drawn["distributions"][0].axes[0].lines[0].get_ydata()
    assert np.asarray(shares)[-1] == 1
    assert (np.diff(np.asarray(shares)) > 0).all()


def test_pictures_are_files(tmp_path: Path) -> None:
    marks = [pictures.Mark("one", 1.0, 1.0, True)]
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        pictures.save(pictures.pareto(marks, "x", "y"), tmp_path / f"a{suffix}")
        assert (tmp_path / f"a{suffix}").read_bytes().startswith(start)
    assert pictures.svg(pictures.pareto(marks, "x", "y")) == pictures.svg(pictures.pareto(marks, "x", "y"))
    with pytest.raises(pictures.PictureError, match=r"\.png or an \.svg"):
        pictures.save(pictures.pareto(marks, "x", "y"), tmp_path / "a.gif")


def test_without_matplotlib_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(pictures.PictureError, match="pip install"):
        pictures.attainment({}, 0.9)


def test_a_page_needs_nothing_else() -> None:
    marks = [pictures.Mark("a <b> & c", 1.0, 1.0, True)]
    svg = pictures.svg(pictures.pareto(marks, "x", "y"))
    text = page(
        "M <1>", [Section("Report", text="1 < 2"), Section("One", svg=svg, caption="c"), Section("Two", svg=svg)]
    )
    assert "M &lt;1&gt;" in text
    assert "<pre>1 &lt; 2</pre>" in text
    assert text.count("<svg") == 2
    assert "<script" not in text
    # Nothing is fetched: addresses are names of XML spaces and the page's own parts.
    for address in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert address.startswith("#"), address
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for target in {*re.findall(r"url\(#([^)]+)\)", text), *re.findall(r'href="#([^"]+)"', text)}:
        assert target in ids
