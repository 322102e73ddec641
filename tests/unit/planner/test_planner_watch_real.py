"""A watch reads a real Prometheus that holds an hour of vLLM's series: what it sees is what was there."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator

import prometheus
import pytest
from prometheus_client import CollectorRegistry, start_http_server
from watched import LARGE, SMALL

from vllm_suite.observability.dashboards import PLANNER
from vllm_suite.planner.plan import Plan
from vllm_suite.planner.traces import Workload
from vllm_suite.planner.watch import Prometheus, WatchError, WatchSeries, Window, watch

SCRAPE_S, HOUR = 15, 240  # scrapes of the hour
FASTER, AWAY, RESTART = 180, range(60, 72), 120  # in scrapes: 3 minutes without any, and an engine that begins anew
BOUNDS = ("50.0", "100.0", "500.0", "+Inf")


def page(start: float) -> Iterator[str]:
    """The hour in OpenMetrics: 2 requests a second of 80 tokens, then 6 of 300; 10 tokens out. Prefill finishes all of
    them too."""
    samples = dict[str, list[str]]()
    for job, scrape in itertools.product(("prefill", "decode"), range(HOUR + 1)):
        if scrape in AWAY:
            continue
        slow, fast = min(scrape, FASTER), max(0, scrape - FASTER)
        if job == "decode" and scrape >= RESTART:
            slow -= RESTART
        few, many = 2 * SCRAPE_S * slow, 6 * SCRAPE_S * fast
        lengths = {"prompt": (0, few, few + many, few + many), "generation": (few + many,) * 4}
        totals = {"prompt": 80 * few + 300 * many, "generation": 10 * (few + many)}
        at = f"{start + SCRAPE_S * scrape:.0f}"
        own = f'engine="0",model_name="m",job="{job}",instance="{job}:8000"'

        def add(family: str, name: str, labels: str, value: float, at: str = at) -> None:
            samples.setdefault(family, []).append(f"{name}{{{labels}}} {value} {at}")

        for reason, count in (("stop", few + many), ("length", 0)):
            done = "vllm:request_success"
            add(f"{done} counter", f"{done}_total", f'{own},finished_reason="{reason}"', count)
        for what, counts in lengths.items():
            name = f"vllm:request_{what}_tokens"
            for bound, count in zip(BOUNDS, counts, strict=True):
                add(f"{name} histogram", f"{name}_bucket", f'{own},le="{bound}"', count)
            add(f"{name} histogram", f"{name}_count", own, few + many)
            add(f"{name} histogram", f"{name}_sum", own, totals[what])
    for family, lines in samples.items():
        yield f"# TYPE {family}"
        yield from sorted(lines, key=lambda line: (line.rsplit(" ", 2)[0], float(line.rsplit(" ", 1)[1])))
    yield "# EOF"


@pytest.fixture(scope="module")
def began() -> float:
    return float(int(time.time()) - 30 - SCRAPE_S * HOUR)


@pytest.fixture(scope="module")
def exported() -> tuple[CollectorRegistry, int]:
    return CollectorRegistry(), prometheus.free_port()


@pytest.fixture(scope="module")
def server(
    began: float, exported: tuple[CollectorRegistry, int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[prometheus.Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "page").write_text("\n".join(page(began)) + "\n")
    prometheus.promtool("tsdb", "create-blocks-from", "openmetrics", str(folder / "page"), str(folder / "tsdb"))
    jobs = [prometheus.job("watch", f"127.0.0.1:{exported[1]}")]
    with prometheus.running(folder, prometheus.free_port(), jobs) as found:
        yield found


def seen(server: prometheus.Prometheus, began: float, **settings: float) -> list[Window]:
    source = Prometheus(server.url, 'job="decode"', **settings)
    return source.windows(began, began + SCRAPE_S * HOUR + source.lag)


def test_windows_may_be_of_a_fraction_of_a_second_more(server: prometheus.Prometheus, began: float) -> None:
    assert len(seen(server, began, step=150.5)) > 15


def test_windows_are_what_was_served(server: prometheus.Prometheus, began: float) -> None:
    windows = seen(server, began)
    # Those of the three minutes without a scrape are not taken for minutes without a request.
    starts = [round((window.start - began) / 60) for window in windows]
    assert starts == [minute for minute in range(60) if minute not in (15, 16, 17)]
    for window, minute in zip(windows, starts, strict=True):
        fast = minute >= FASTER / 4
        about = pytest.approx(6 if fast else 2, rel=0.02)
        if minute == RESTART / 4 - 1:
            continue  # the restart's own
        assert window.rate == about, minute
        assert window.prompts.count / 60 == about
        assert window.prompts.mean == pytest.approx(300 if fast else 80, rel=0.02)
        assert window.outputs.mean == pytest.approx(10, rel=0.02)
        assert window.prompts.counts[2 if fast else 1] == pytest.approx(window.prompts.count)
    # A restart loses what came before its first scrape, and no more.
    (restarted,) = (window for window, minute in zip(windows, starts, strict=True) if minute == RESTART / 4 - 1)
    assert 1 <= restarted.rate <= 2.5


def test_without_a_selector_both_instances_count(server: prometheus.Prometheus, began: float) -> None:
    (window,) = Prometheus(server.url).windows(began + 60, began + 60 + 75)
    assert window.rate == pytest.approx(4, rel=0.02)


def test_windows_shorter_than_two_scrapes_say_so(server: prometheus.Prometheus, began: float) -> None:
    with pytest.raises(WatchError, match=r"two samples in 10s.*at least twice in a window"):
        seen(server, began, step=10.0)
    with pytest.raises(WatchError, match="no series"):
        Prometheus(server.url, 'job="none"').windows(began, began + 600)


class Larger:
    """The larger plan serves everything."""

    def best(self, workload: Workload) -> Plan:
        return LARGE

    def goodput(self, plan: Plan, workload: Workload) -> float:
        return 3.0 if plan == SMALL else 9.0


def test_a_watch_exports_what_it_sees_and_does(
    server: prometheus.Prometheus, began: float, exported: tuple[CollectorRegistry, int]
) -> None:
    """A look a minute until the hour ends, on a clock of its own."""
    registry, port = exported
    now, said = [began + 40 * 60 + 15.0], list[str]()

    def sleep(seconds: float) -> None:
        now[0] += seconds

    source = Prometheus(server.url, 'job="decode"')
    plan = watch(source, SMALL, Larger(), say=said.append, looks=21, series=WatchSeries(registry),
                 clock=lambda: now[0], sleep=sleep)  # fmt: skip
    assert plan == LARGE
    (shift,) = (line for line in said if line.startswith("at "))
    rate, prompts = (float(after) for after in re.findall(r"-> ([\d.]+)", shift))
    # A window of the old traffic may be among the ten.
    assert rate == pytest.approx(6, rel=0.1)
    assert prompts == pytest.approx(300, rel=0.05)
    http, _ = start_http_server(port, "127.0.0.1", registry)
    try:
        server.until(lambda: not [expr for expr in server.blank(PLANNER) if "vllm_suite_watch" in expr], "the series")
        for of, near in (("plan", 0.1), ("now", 0.02)):
            assert server.number(f'vllm_suite_watch_requests_per_second{{of="{of}"}}') == pytest.approx(6, rel=near)
            prompts = server.number(f'vllm_suite_watch_mean_tokens{{of="{of}",what="prompts"}}')
            assert prompts == pytest.approx(300, rel=near)
        assert server.number('vllm_suite_watch_replans_total{outcome="changed"}') == 1
        assert server.number('vllm_suite_watch_goodput_requests_per_second{plan="best"}') == 9
        assert server.number('vllm_suite_watch_looks_total{outcome="ok"}') == 21
    finally:
        http.shutdown()
