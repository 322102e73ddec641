"""Outcomes: quantiles in little memory, what part of a run counts, intervals, goodput that N does not move."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
from simulated import ExactSource

from vllm_suite.planner.evaluate import evaluate, goodput
from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import load
from vllm_suite.planner.outcome import Collector, Outcome
from vllm_suite.planner.plan import Plan, PoolPlan, Slo
from vllm_suite.planner.simulator.fleet import FleetRun
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.simulator.setting import Setting
from vllm_suite.planner.steady import growing, mser, share_interval, window
from vllm_suite.planner.tally import ACCURACY, Tally
from vllm_suite.planner.traces import Workload

MODEL, QUANT = load("meta-llama/Llama-3.1-8B")
H100 = cluster("2xH100-SXM")
ONE = Plan((PoolPlan("any", 1, max_num_batched_tokens=2048, kv_blocks=20_000),))
APART = Plan((PoolPlan("prefill", 1, max_num_batched_tokens=2048, kv_blocks=20_000),
              PoolPlan("decode", 1, kv_blocks=20_000)))  # fmt: skip
# A step of 50 ms, 10 us for a token of a prompt, 0.1 us for a token of context.
SETTING = Setting(MODEL, QUANT, H100, lambda pool: ExactSource(0.05, 1e-5, key=1e-7))
SLO = Slo(ttft=0.3, tpot=0.08)


WORKLOAD = Workload.synthetic(400, 40, cv=0.5)
RATE = 45.0
NEAR = Slo(ttft=0.1, tpot=0.02)


def served(number: int, arrival: float, ttft: float, tpot: float, output: int = 11, **more: float) -> Served:
    first = arrival + ttft
    return Served(
        number, arrival, 100, output, prefill_start=arrival, prefilled=first, first_token=first,
        last_token=first + tpot * (output - 1), longest_gap=2 * tpot if output > 1 else 0.0, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def collected(rows: Iterator[Served], slo: Slo = NEAR, warm_up: float | None = 0.0, **more: bool) -> Outcome:
    collector, last = Collector(slo, warm_up, **more), 0.0
    for row in rows:
        collector(row)
        last = max(last, row.last_token)
    return collector.outcome(ONE, FleetRun(last, {}), SETTING)


def test_quantiles_of_what_came_in() -> None:
    draw = np.random.default_rng(1)
    ttft, tpot = draw.lognormal(-2, 1, 20_000), draw.lognormal(-4, 0.5, 20_000)
    outputs = np.where(draw.random(20_000) < 0.1, 1, 11)
    found = collected(
        served(i, i / 100, *row)
        for i, row in enumerate(zip(ttft.tolist(), tpot.tolist(), outputs.tolist(), strict=True))
    )
    several = outputs > 1
    for q in (50, 90, 95, 99):
        for metric, values in (("ttft", ttft), ("tpot", tpot[several])):
            exact = np.percentile(values, q, method="inverted_cdf")
            assert getattr(getattr(found, metric), f"p{q}") == pytest.approx(exact, rel=ACCURACY)
    assert found.ttft.mean == pytest.approx(ttft.mean())
    assert found.tpot.mean == pytest.approx(tpot[several].mean())
    assert found.longest_gap.mean == pytest.approx(2 * tpot[several].mean())
    met = (ttft <= 0.1) & ((tpot <= 0.02) | ~several)
    assert found.attainment == pytest.approx(met.mean())
    assert found.ttft_met == pytest.approx((ttft <= 0.1).mean())
    assert (found.requests, found.counted) == (20_000, 20_000)
    assert found.ttft.at_share == found.ttft.p90
    assert found.rate == pytest.approx(100, rel=0.01)


def test_memory_does_not_grow() -> None:
    tally = Tally(NEAR)
    sizes = []
    for number in range(50_000):
        tally(served(number, number * 0.3, 0.05, 0.01))
        if number % 10_000 == 5_000:
            sizes.append(sum(map(sys.getsizeof, (tally.sums, tally.counts, tally._rows))))
    assert max(sizes) < 1.1 * sizes[0]
    tally.flush()
    # Every request is still there, in its place.
    assert tally.sums[:, 0].sum() == 50_000
    assert tally.width * 64 > 50_000 * 0.3 >= tally.width * 32
    whole = 15_000 / tally.width
    assert tally.sums[: int(whole), 0] == pytest.approx(np.full(int(whole), tally.width / 0.3), abs=1.1)


def test_stages_of_a_request_through_all_pools() -> None:
    one = Served(0, 1.0, 100, 11, "", 1.5, 2.0, 2.25, 3.0, 3.5, 3.75, 4.0, 4.5, 4.75, 6.0, 0.2)
    plain = served(1, 1.0, 0.5, 0.1)
    found = collected(iter([one, plain]))
    assert found.stages == pytest.approx(
        {"queue": (one.queue_s + plain.queue_s) / 2, "encode": 0.5, "fetch": 0.25, "prefill": 0.5, "transfer": 0.25,
         "decode_wait": 0.5, "decode": (1.25 + 1.0) / 2}
    )  # fmt: skip
    assert one.queue_s == 0.5 + 0.75 + 0.25 + 0.5


def test_a_request_without_times_is_an_error() -> None:
    with pytest.raises(ValueError, match="first and its last token"):
        collected(iter([served(0, 1.0, math.nan, 0.1)]))
    with pytest.raises(ValueError, match="no request to judge"):
        collected((served(i, float(i), 0.1, 0.1) for i in range(5)), warm_up=100.0)


def test_an_outcome_is_json() -> None:
    found = evaluate(ONE, SETTING, lambda: Workload.synthetic(50, 1).requests(5.0, 200), SLO, rate=5.0)
    assert found.tpot.mean != found.tpot.mean
    text = json.dumps(found.as_json(), allow_nan=False)
    assert json.loads(text)["tpot"]["p99"] is None
    assert json.loads(text)["steady"] is True


def test_a_fleet_that_fills_is_cut_at_its_beginning() -> None:
    # TPOT rises over the first 20 s to its level; so do many requests' times.
    draw = np.random.default_rng(2)

    def rows() -> Iterator[Served]:
        for number in range(4000):
            arrival = number / 20
            level = 0.015 * (1 - math.exp(-arrival / 7))
            yield served(number, arrival, 0.05 * draw.lognormal(0, 0.2), level * draw.lognormal(0, 0.2))

    found = collected(rows(), warm_up=None)
    assert found.trend == "steady"
    assert 10 < found.warm_up_s < 60
    assert found.tpot.mean == pytest.approx(0.015 * math.exp(0.02), rel=0.02)
    everything = collected(rows(), warm_up=0.0)
    assert everything.counted == 4000
    assert everything.tpot.mean < 0.985 * 0.015


def test_short_runs_count_whole_and_say_so() -> None:
    found = collected((served(i, i / 20, 0.05, 0.02, 201) for i in range(200)), warm_up=None)
    # 10 s of arrivals, requests of 4 s.
    assert (found.trend, found.counted, found.steady) == ("short", 200, False)


def test_rising_waits_are_growth_and_noise_is_not() -> None:
    draw = np.random.default_rng(3)
    counts, time = np.full(48, 40.0), np.arange(48.0)
    alarms = 0
    for _ in range(400):
        # Correlated noise, as batch means of a queue are.
        noise = np.convolve(draw.normal(0, 0.2, 60), np.ones(4) / 2, "valid")[:48]
        assert growing(counts, 0.1 + 0.02 * time + 0.1 * noise)
        alarms += growing(counts, 1 + noise)
    assert alarms / 400 < 0.03
    # What rose in the first quarter and stays there does not grow.
    assert not growing(counts, np.minimum(time, 12) + draw.normal(0, 0.3, 48))


def test_the_cut_finds_the_end_of_the_beginning() -> None:
    draw, cuts = np.random.default_rng(4), []
    for _ in range(100):
        series = np.where(np.arange(50) < 8, 0.2, 1.0) + draw.normal(0, 0.1, 50)
        cuts.append(mser(np.full(50, 9.0), series))
    assert min(cuts) >= 7
    assert np.median(cuts) <= 9
    assert window(np.full(50, 9.0), np.full(50, 1.0), np.full(50, 1.0), 3.0, 2.0, 99.0, True).begin == 2


@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_the_interval_of_a_share_holds(memory: float) -> None:
    # Lateness of neighbours is correlated: an autoregressive queue, and a share of 90 % below its 90th percentile.
    draw, inside, rounds = np.random.default_rng(5), 0, 300
    for _ in range(rounds):
        noise = draw.normal(0, 1, 64 * 30)
        level = np.empty_like(noise)
        level[0] = noise[0] / math.sqrt(1 - memory**2)
        for index in range(1, len(noise)):
            level[index] = memory * level[index - 1] + noise[index]
        hits = (level * math.sqrt(1 - memory**2) <= 1.2816).reshape(64, 30).sum(axis=1).astype(float)
        low, high = share_interval(hits, np.full(64, 30.0), 3)
        inside += low <= 0.9 <= high
    assert inside / rounds > 0.91


def test_a_share_without_misses_is_not_certain() -> None:
    low, high = share_interval(np.full(20, 30.0), np.full(20, 30.0), 1)
    assert high == 1.0
    # Wilson's interval of 600 of 600.
    assert low == pytest.approx(1 / (1 + 1.96**2 / 600), abs=1e-4)


def test_the_share_of_a_stable_plan_does_not_depend_on_n() -> None:
    found = {}
    for count in (600, 2400, 9600):
        found[count] = evaluate(ONE, SETTING, partial(WORKLOAD.requests, 50.0, count), SLO, rate=50.0)
        assert found[count].steady
    best = found[9600]
    assert 0.6 < best.attainment < 0.99
    assert best.high - best.low < 0.1
    for outcome in found.values():
        assert outcome.low <= best.high
        assert best.low <= outcome.high
        assert outcome.tpot.mean == pytest.approx(best.tpot.mean, rel=0.03)


def test_an_unstable_plan_is_recognised() -> None:
    # A step takes up 2048 tokens and 50 ms, so that no more than 70 requests of 440 tokens a second fit.
    for count in (2400, 9600):
        found = evaluate(ONE, SETTING, partial(WORKLOAD.requests, 80.0, count), SLO, rate=80.0)
        assert found.trend == "growing"
        assert found.attainment < 0.2


@pytest.mark.parametrize(
    ("plan", "slo", "counts"),
    [
        pytest.param(ONE, SLO, (600, 2400, 9600), id="colocated"),
        pytest.param(ONE, Slo(5.0), (600, 2400), id="throughput"),
        pytest.param(APART, Slo(0.35, 0.08), (600, 2400), id="apart", marks=pytest.mark.slow),
    ],
)
def test_goodput_does_not_depend_on_n(plan: Plan, slo: Slo, counts: tuple[int, ...]) -> None:
    found = [goodput(plan, SETTING, WORKLOAD, slo, requests=count, start=RATE) for count in counts]
    best = found[-1]
    assert best.rate > 1
    for each in found:
        assert each.low <= each.rate <= each.high
        assert each.low <= best.high
        assert best.low <= each.high
        assert each.rate == pytest.approx(best.rate, rel=0.15)
        assert each.per_gpu == each.rate / plan.gpus
    assert best.high / best.low < 1.2
    # Lengths with a spread of 50 % have a mean that is sure to 1.96 x 50 % / sqrt(n).
    error = best.outcome.load_error
    assert error == pytest.approx(0.5 / best.outcome.counted**0.5, rel=0.15)
    assert best.high - best.low >= 3.9 * error * best.rate
    assert best.outcome.attainment >= 0.9


def test_goodput_says_what_it_fails_on() -> None:
    assert goodput(ONE, SETTING, WORKLOAD, Slo(ttft=5.0, tpot=0.055), requests=300, start=RATE).limit == "tpot"
    assert goodput(APART, SETTING, WORKLOAD, Slo(ttft=0.2, tpot=1.0), requests=300, start=RATE).limit == "ttft"
    assert goodput(ONE, SETTING, WORKLOAD, Slo(ttft=None, tpot=None), requests=300, start=RATE).limit == "throughput"
    never = goodput(ONE, SETTING, WORKLOAD, Slo(ttft=0.001), requests=300, start=RATE)
    assert (never.rate, never.low, never.high, never.limit) == (0.0, 0.0, 0.0, "ttft")
    assert never.outcome.ttft.p50 > 0.001
    json.dumps(never.as_json(), allow_nan=False)


def test_recorded_traffic_is_not_judged_by_its_own_changes() -> None:
    # The rate doubles in the second half: waits rise, and that is the trace's doing.
    arrivals = np.concatenate([np.arange(0, 100, 0.05), np.arange(100, 200, 0.025)])

    def rows() -> Iterator[Served]:
        for number, arrival in enumerate(arrivals.tolist()):
            yield served(number, arrival, 0.02 if arrival < 100 else 0.02 + (arrival - 100) / 2000, 0.01)

    assert collected(rows(), warm_up=None).trend == "growing"
    found = collected(rows(), warm_up=None, stationary=False)
    assert found.trend == "steady"
    assert found.warm_up_s < 7
