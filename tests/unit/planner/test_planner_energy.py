"""The power model and the Chrome trace: observers of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from simulated import ExactSource

from vllm_suite.planner.energy import MEMORY, Load, Meter
from vllm_suite.planner.evaluate import evaluate
from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import Parallel, Quantization, load
from vllm_suite.planner.observing import Both
from vllm_suite.planner.plan import Plan, PoolPlan, Slo
from vllm_suite.planner.simulator.engine import Engine
from vllm_suite.planner.simulator.fleet import simulate_plan
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.simulator.setting import Setting
from vllm_suite.planner.sources.steps import DecodeLine, Steps
from vllm_suite.planner.timeline import Timeline
from vllm_suite.planner.traces import Workload

MODEL, QUANT = load("meta-llama/Llama-3.1-8B")
H100 = cluster("2xH100-SXM")
DEVICE = H100.device
SETTING = Setting(MODEL, QUANT, H100, lambda pool: ExactSource(0.01, 1e-5, key=1e-8))
APART = Plan((PoolPlan("prefill", 1), PoolPlan("decode", 1)))
SPAN = DEVICE.power.tdp_w - DEVICE.power.idle_w
WORKLOAD = Workload.synthetic(400, 40, cv=0.5)


def of(parallel: Parallel, quant: Quantization = QUANT) -> Load:
    return Load.of(MODEL, quant, parallel, SETTING)


def test_a_step_is_its_operations_and_its_bytes() -> None:
    one = of(Parallel())
    # Parameters but for the embedding (128,256 x 4,096) are read once a step, and two operations a token each.
    held = 8_030_261_248 - 128_256 * 4096
    assert one.weights * DEVICE.bandwidth == pytest.approx(2 * held, rel=1e-4)
    assert (one.token + one.sampled) * DEVICE.flops("bf16") == pytest.approx(2 * held, rel=1e-3)
    # 8 heads of keys and of values, 128 wide, two bytes, 32 layers.
    assert one.cached * DEVICE.bandwidth == 2 * 8 * 128 * 2 * 32
    assert one.pair * DEVICE.flops("bf16") == 4 * 32 * 128 * 32


def test_power_lies_between_idle_and_full() -> None:
    one = of(Parallel())
    decode = Steps.of(contexts=[1])
    at_memory = one.weights / 0.9
    watts = float(one.joules(at_memory, 1, decode, SPAN)) / at_memory
    # One sequence at nine tenths of the bandwidth: six tenths of the span, and next to no operations.
    assert watts == pytest.approx(0.6 * SPAN, rel=0.02)
    prompt = Steps.of(chunks=[(8192, 0)])
    at_peak = float((one.token * 8192 + one.pair * prompt.prefill_pairs) / 0.75)
    assert float(one.joules(at_peak, 1, prompt, SPAN)) == pytest.approx(SPAN * at_peak)
    assert float(one.joules(10 * at_peak, 1, prompt, SPAN)) < 1.2 * SPAN * at_peak
    assert MEMORY < 1


def test_tensor_parallel_engines_do_the_same_work_together() -> None:
    one, two = of(Parallel()), of(Parallel(tp=2))
    assert two.gpus == 2
    assert two.weights == pytest.approx(one.weights, rel=1e-3)
    assert two.token == pytest.approx(one.token, rel=1e-6)
    staged = of(Parallel(pp=2))
    assert staged.weights == pytest.approx(one.weights, rel=1e-3)
    half = of(Parallel(), Quantization.named("bf16", weights="fp8"))
    assert half.weights < 0.6 * one.weights
    assert half.token == pytest.approx(one.token / 2, rel=1e-3)


def test_experts_that_no_token_meets_are_not_read() -> None:
    model, quant = load("Qwen/Qwen3-30B-A3B")
    sparse = Load.of(model, quant, Parallel(), SETTING)
    single = float(sparse.joules(1.0, 1, Steps.of(contexts=[1]), SPAN))
    many = float(sparse.joules(1.0, 1, Steps.of(contexts=[1] * 256), SPAN))
    # 8 of 128 experts of 30 billion parameters.
    assert single < 0.2 * many


class Every:
    """Runs of steps as they come, in steps of their own."""

    def __init__(self) -> None:
        self.joules = 0.0

    def __call__(
        self, engine: Engine, start: float, end: float, count: int, steps: Steps, line: DecodeLine | None
    ) -> None:
        one = of(Parallel())
        for index in range(count):
            now = steps._replace(decode_context=steps.decode_context + index * steps.decode_sequences)
            self.joules += float(one.joules((end - start) / count, 1, now, SPAN))


def test_the_meter_adds_up_every_step() -> None:
    meter, every = Meter(APART, SETTING), Every()
    requests = WORKLOAD.requests(20.0, 150)
    run = simulate_plan(APART, SETTING, requests, lambda served: None, observer=Both(meter, every))
    assert meter.joules(run) == pytest.approx(every.joules, rel=1e-6)
    assert every.joules > 0


def test_idle_accelerators_are_counted() -> None:
    found = {
        count: evaluate(Plan((PoolPlan("any", count),)), SETTING, lambda: WORKLOAD.requests(4.0, 400), Slo(), rate=4.0,
                        energy=True)
        for count in (1, 2)
    }  # fmt: skip
    one, two = found[1].joules_per_token, found[2].joules_per_token
    assert one is not None
    assert two is not None
    # The second one reads weights of its own, and draws its idle power all the time.
    assert two - one > 0.95 * DEVICE.power.idle_w / found[2].tokens_per_s
    watts = two * found[2].tokens_per_s
    assert 2 * DEVICE.power.idle_w < watts < 2 * DEVICE.power.tdp_w
    quiet = evaluate(APART, SETTING, lambda: WORKLOAD.requests(0.001, 40), Slo(), rate=0.001, energy=True)
    assert quiet.joules_per_token is not None
    assert quiet.joules_per_token * quiet.tokens_per_s == pytest.approx(2 * DEVICE.power.idle_w, rel=0.01)
    assert found[1].money_per_million is None
    priced = DEVICE.model_copy(update={"price_per_hour": 3.6})
    dear = Setting(MODEL, QUANT, H100.model_copy(update={"device": priced}), SETTING.source)
    outcome = evaluate(APART, dear, lambda: WORKLOAD.requests(4.0, 400), Slo(), rate=4.0)
    # Two at 0.001 a second, for the tokens of that second.
    assert outcome.money_per_million == pytest.approx(2 * 0.001 / outcome.tokens_per_s * 1e6)


def test_a_run_as_a_chrome_trace(tmp_path: Path) -> None:
    timeline, finished = Timeline(APART, begin=1.0, seconds=2.0), []

    def sink(served: Served) -> None:
        finished.append(served)
        timeline.served(served)

    simulate_plan(APART, SETTING, WORKLOAD.requests(20.0, 150), sink, observer=timeline)
    timeline.write(tmp_path / "trace.json")
    document = json.loads((tmp_path / "trace.json").read_text())
    events = document["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C", "b", "e"}
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {
        "pool prefill", "pool decode", "requests"}  # fmt: skip
    steps = [event for event in events if event["ph"] == "X"]
    assert all(1e6 <= event["ts"] < 3e6 and event["dur"] > 0 for event in steps)
    assert {event["pid"] for event in steps if event["cat"] == "prompt"} >= {1}
    for pid in (1, 2):
        # Steps of an engine follow each other.
        own = sorted((event["ts"], event["dur"]) for event in steps if event["pid"] == pid)
        assert len(own) > 5
        starts, lengths = np.array(own).T
        assert (starts[:-1] + lengths[:-1] <= starts[1:] + 1e-3).all()
    asked = [served for served in finished if 1.0 <= served.arrival < 3.0]
    begun = [event for event in events if event["ph"] == "b" and event["name"].startswith("request")]
    assert len(begun) == len(asked) > 20
    for request in asked:
        own = [event for event in events if event.get("id") == request.number]
        assert [event["ts"] for event in own] == sorted(event["ts"] for event in own)
        names = [event["name"] for event in own if event["ph"] == "b"]
        assert names == [f"request {request.number}", "prefill", "transfer", "decode"] or request.prompt < 256
        assert sum(event["ph"] == "b" for event in own) == sum(event["ph"] == "e" for event in own)


def test_a_chrome_trace_does_not_grow_without_end() -> None:
    timeline = Timeline(APART, seconds=1e9, most=50)
    simulate_plan(APART, SETTING, WORKLOAD.requests(20.0, 100), timeline.served, observer=timeline)
    document = timeline.as_json()
    assert len([event for event in document["traceEvents"] if event["ph"] != "M"]) <= 50
    assert document["otherData"]["dropped_events"] > 100
