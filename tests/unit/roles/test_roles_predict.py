"""The goodput rule with the planner's model: what it sees of the traffic, what it predicts, and what it asks for."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vllm_suite.fleet.spec import FleetSpec
from vllm_suite.planner.simulator.switching import Stage, Switch
from vllm_suite.roles.decider import Decider
from vllm_suite.roles.follow import Foresee, rule_of
from vllm_suite.roles.predict import PredictError, Predictor
from vllm_suite.roles.seen import Seen, Work
from vllm_suite.roles.traffic import Observer, Traffic

ROOT = Path(__file__).parents[3]
CAN = ("prefill", "decode", "any")


def fleet(**predict: Any) -> FleetSpec:
    return FleetSpec.model_validate({
        "model": "meta-llama/Llama-3.1-8B",
        "engine": {"max_num_seqs": 256, "max_num_batched_tokens": 8192},
        "pools": {"any": {"replicas": 8}},
        "slo": {"ttft": "500ms", "tpot": "30ms"},
        "roles": {"rule": "goodput", "agree": 2, "hold": 0, "predict": {"hardware": "8xH100", "window": 20, **predict}},
    })  # fmt: skip


PROMPTS, ANSWERS = Traffic(30.0, 6000, 60, 0, 8), Traffic(60.0, 300, 1200, 0, 200)


def seen(name: str, role: Any, work: Work | None, queue: int = 0, running: int = 0, role_epoch: int = 0) -> Seen:
    return Seen(name, f"http://{name}", "e", role, role_epoch, "serving", True, CAN, queue, running, work)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(fleet())


def test_more_engines_where_the_work_is(predictor: Predictor) -> None:
    def best(traffic: Traffic) -> int:
        return max(range(1, 8), key=lambda p: predictor.goodput(traffic, {"prefill": p, "decode": 8 - p}))

    assert best(PROMPTS) >= 5
    assert best(ANSWERS) <= 2
    # No more than what comes, and what waits counts as coming.
    assert predictor.goodput(Traffic(0.5, 6000, 60, 0, 1), {"prefill": 4, "decode": 4}) == 0.5
    assert predictor.goodput(Traffic(0.5, 6000, 60, 20, 1), {"prefill": 4, "decode": 4}) == 1.5
    assert predictor.goodput(PROMPTS, {"prefill": 0, "decode": 8}) == 0.0


def test_the_share_of_requests_is_that_of_slo_unless_it_is_given() -> None:
    asked = fleet()
    asked = asked.model_copy(update={"slo": asked.slo.model_copy(update={"attainment": 0.97})})
    assert Predictor(asked)._slo.attainment == Predictor(asked)._free.attainment == 0.97
    assert Predictor(fleet(attainment=0.8))._slo.attainment == 0.8


def test_targets_that_nothing_meets_leave_a_comparison(predictor: Predictor) -> None:
    # A prompt of 120,000 tokens takes longer than 500 ms on any of these.
    found = [predictor.goodput(Traffic(5.0, 120_000, 60, 0, 1), {"prefill": p, "decode": 8 - p}) for p in (2, 6)]
    assert 0 < found[0] < found[1]


def test_a_switch_costs_what_runs(predictor: Predictor) -> None:
    short, long = (predictor.switch_seconds(Traffic(1, 500, tokens, 0, 64), "decode", 4) for tokens in (50, 2000))
    assert 1.0 < short < long / 5
    assert predictor.switch_seconds(ANSWERS, "prefill", 4) < 1.2


def looks(observer: Observer, role: str, arrivals: int, prompt: int, output: int, n: int = 6) -> None:
    """One prefill and one decode instance, a look a second."""
    for turn in range(n):
        p = Work({"prefill": arrivals * turn}, arrivals * turn, arrivals * turn * prompt, arrivals * turn)
        d = Work({"decode": arrivals * turn}, arrivals * turn, arrivals * turn * prompt,
                 arrivals * turn * output, arrivals * turn * output)  # fmt: skip
        observer.see([seen("p", "prefill", p), seen("d", role, d)], float(turn))


def test_traffic_is_what_was_counted_between_looks() -> None:
    observer = Observer(20)
    assert observer.traffic() is None
    looks(observer, "decode", 10, 700, 50)
    assert observer.traffic() == Traffic(10.0, 700.0, 50.0, 0, 0)
    # What an instance did in two lives or roles is not counted.
    observer = Observer(20)
    looks(observer, "decode", 10, 700, 50, 2)
    observer.see([seen("p", "prefill", Work({"prefill": 10}, 10, 7000, 10)),
                  seen("d", "decode", Work({}, 0, 0, 0, 0), role_epoch=1)], 2.0)  # fmt: skip
    assert observer.traffic() == Traffic(5.0, 700.0, 50.0, 0, 0)
    # It forgets.
    for turn in range(3, 40):
        observer.see([seen("p", "prefill", None), seen("d", "decode", None)], float(turn))
    assert observer.traffic() is None


def test_long_answers_show_before_they_end() -> None:
    observer = Observer(20)
    for turn in range(3):
        p = Work({"prefill": 4 * turn}, 4 * turn, 400 * turn, 4 * turn)
        d = Work({"decode": 4 * turn}, 0, 0, 0, 800 * turn)
        observer.see([seen("p", "prefill", p), seen("d", "decode", d, running=8)], float(turn))
    assert observer.traffic() == Traffic(4.0, 100.0, 200.0, 0, 8)


def decided(rule: Foresee, traffic: Traffic, prefill: int, decode: int) -> Switch | None:
    stages = [Stage("prefill", 0, 0, prefill), Stage("decode", 0, 0, decode)]
    return rule._asked(traffic, stages, 0.0)


def test_the_rule_follows_the_mix_and_rests_when_all_is_served(predictor: Predictor) -> None:
    predict = fleet().roles.predict
    assert predict is not None
    rule = Foresee(predictor, predict)
    assert decided(rule, PROMPTS, 2, 6) == Switch("decode", "prefill")
    assert rule.figures()["goodput_best"] > rule.figures()["goodput"] > 0
    assert decided(rule, ANSWERS, 6, 2) == Switch("prefill", "decode")
    assert decided(rule, Traffic(0.5, 6000, 60, 0, 1), 2, 6) is None
    # Alternating traffic ends somewhere: each switch raises goodput, so there is no way back under the same traffic.
    prefill, steps = 1, 0
    while (asked := decided(rule, PROMPTS, prefill, 8 - prefill)) is not None:
        prefill += 1 if asked.target == "prefill" else -1
        steps += 1
        assert steps < 8
    assert decided(rule, PROMPTS, prefill, 8 - prefill) is None


def test_the_decider_asks_it_without_a_queue() -> None:
    spec = fleet(hardware="8xH100")
    rule = rule_of(spec)
    one = Decider(spec.roles, rule)

    def look(turn: int) -> Sequence[Seen]:
        p = Work({"prefill": 30 * turn}, 30 * turn, 30 * turn * 6000, 30 * turn)
        d = Work({"decode": 30 * turn}, 30 * turn, 30 * turn * 6000, 30 * turn * 60, 30 * turn * 60)
        return [seen("p0", "prefill", p), *(seen(f"d{i}", "decode", d if i == 0 else None) for i in range(6))]

    moves = []
    for turn in range(4):
        rule.see(look(turn), float(turn))
        moves.append(one.decide(look(turn), float(turn)))
    # The first look has nothing before it; then it has to agree twice.
    assert [move is not None for move in moves] == [False, False, True, True]
    assert moves[2] is not None
    assert moves[2].target == "prefill"


def test_it_says_what_is_missing() -> None:
    data = fleet().model_dump(mode="json", exclude_unset=True)
    with pytest.raises(ValidationError, match="rule goodput needs `predict`"):
        FleetSpec.model_validate({**data, "roles": {"rule": "goodput"}})
    for predict, text in (
        ({"hardware": "8xAbacus"}, "no hardware 'Abacus'"),
        ({"hardware": "8xH100", "source": "tea-leaves"}, "no source 'tea-leaves'"),
        ({"hardware": "8xH100", "source": "calibrated=/nowhere"}, "no file"),
    ):
        with pytest.raises(PredictError, match=text):
            Predictor(FleetSpec.model_validate({**data, "roles": {"rule": "goodput", "predict": predict}}))
    assert math.isnan(Foresee(Predictor(fleet()), fleet().roles.predict).figures().get("demand", math.nan))  # type: ignore[arg-type]


def test_measured_steps_of_a_real_engine_decide(tmp_path: Path) -> None:
    """The calibration that `planner_cpu` recorded on two cores; its engine's own settings hold where none are given."""
    recorded = json.loads((ROOT / "benchmarks/results/planner_cpu.cpu-2core.json").read_text())["calibration"]
    (tmp_path / "engine.json").write_text(json.dumps(recorded))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 512, "num_hidden_layers": 4,
              "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1024, "vocab_size": 1024,
              "max_position_embeddings": 2048, "torch_dtype": "bfloat16"}  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    spec = FleetSpec.model_validate({
        "model": str(tmp_path / "model"),
        "pools": {"any": {"replicas": 3}},
        "roles": {
            "rule": "goodput",
            "limits": {"decode": {"max_num_seqs": 4}},
            "predict": {"hardware": "3xCPU-2CORE", "source": f"calibrated={tmp_path / 'engine.json'}", "window": 10},
        },
    })  # fmt: skip
    predictor = Predictor(spec)
    assert (predictor._pools["prefill"].max_num_seqs, predictor._pools["decode"].max_num_seqs) == (16, 4)
    assert predictor._pools["decode"].kv_blocks == 1024
    rule = Foresee(predictor, spec.roles.predict)  # type: ignore[arg-type]
    prompts, answers = Traffic(100.0, 1500, 4, 0, 2), Traffic(100.0, 40, 160, 0, 4)
    assert decided(rule, prompts, 1, 2) == Switch("decode", "prefill")
    assert decided(rule, answers, 2, 1) == Switch("prefill", "decode")
    assert decided(rule, prompts, 2, 1) is decided(rule, answers, 1, 2) is None
