"""DistServe's simulator by its own rules: against a simulation that moves every token, and against its own outputs."""

from __future__ import annotations

import csv
import heapq
import json
import os
import random
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_suite.planner.distserve import ring
from vllm_suite.planner.distserve.capacity import closed_form, kv_tokens, measured
from vllm_suite.planner.distserve.parity import Latencies, Placement, Workload, sample, simulate
from vllm_suite.planner.distserve.search import Question, best_rate, colocated, pairs, search
from vllm_suite.planner.sources.base import SourceError
from vllm_suite.planner.sources.linear import distserve

MODEL = "facebook/opt-13b"
DATA = Path(os.environ.get("VLLM_SUITE_DATA", Path(__file__).parents[4] / "shared" / "data"))


class Tokens:
    """The rules written out: every worker, every request, one token at a time."""

    def __init__(self, placement: Placement, work: Workload, budget: int, capacity: int) -> None:
        self.work, self.budget, self.capacity = work, budget, capacity
        self.keeps = placement.decode is None
        self.engine: Any = "vllm" if self.keeps else "distserve"
        self.events: list[tuple[float, int, Any]] = []
        self.order = count()
        self.ttft = [0.0] * len(work.prompt)
        self.ended = [0.0] * len(work.prompt)
        self.done = [0] * len(work.prompt)
        self.heads = [self.chain(placement, placement.prefill) for _ in range(placement.prefills)]
        cut = placement.decode
        self.others = [self.chain(placement, cut) for _ in range(placement.decodes)] if cut else self.heads

    def chain(self, placement: Placement, cut: tuple[int, int]) -> list[dict[str, Any]]:
        cost = distserve(placement.model, cut[0], engine=self.engine).coefficients
        stages: list[dict[str, Any]] = [
            {"rank": rank, "cost": cost, "pp": cut[1], "prompts": [], "decodes": [], "busy": False, "now": 0}
            for rank in range(cut[1])
        ]
        for rank, stage in enumerate(stages):
            stage["next"] = stages[(rank + 1) % cut[1]]
        return stages

    def run(self) -> Latencies:
        for request, now in enumerate(self.work.arrival.tolist()):
            heapq.heappush(self.events, (now, next(self.order), request))
        while self.events:
            now, _, event = heapq.heappop(self.events)
            if isinstance(event, int):
                head = min((one[0] for one in self.heads), key=lambda one: one["now"] + len(one["prompts"]))
                head["prompts"].append((event, None))
                self.start(head, now)
            else:
                self.finish(*event, now)
        ttft = np.array(self.ttft)
        return Latencies(ttft - self.work.arrival, (np.array(self.ended) - ttft) / self.work.output)

    def start(self, stage: dict[str, Any], now: float) -> None:
        if stage["busy"] or not (stage["prompts"] or stage["decodes"]):
            return
        cost, first = stage["cost"], stage["rank"] == 0
        if stage["prompts"]:
            batch = []
            if first:
                room, mark = self.capacity, next(self.order)
                while stage["prompts"] and self.work.prompt[stage["prompts"][0][0]] <= room:
                    request, _ = stage["prompts"].pop(0)
                    room -= int(self.work.prompt[request])
                    batch.append((request, mark))
            else:
                mark = stage["prompts"][0][1]
                while stage["prompts"] and stage["prompts"][0][1] == mark:
                    batch.append(stage["prompts"].pop(0))
            lengths = [int(self.work.prompt[request]) for request, _ in batch]
            a, b, c = cost.prefill
            duration = (a + b * sum(lengths) + c * sum(one**2 for one in lengths)) / stage["pp"] + stage["pp"]
            tokens, stage["now"] = sum(lengths), len(batch)
        else:
            batch, room = [], self.budget
            while stage["decodes"] and len(batch) < self.capacity and self.context(stage["decodes"][0]) + 1 <= room:
                room -= self.context(stage["decodes"][0]) + 1
                batch.append(stage["decodes"].pop(0))
            a, b, c = cost.decode_small if len(batch) < 95 else cost.decode_large
            tokens = sum(self.context(request) for request in batch)
            duration = (a + b * (tokens + len(batch)) + c * len(batch)) / stage["pp"]
        if first:
            duration += 2 + 1e-4 * tokens
        stage["busy"] = True
        heapq.heappush(self.events, (now + duration, next(self.order), (stage, batch)))

    def context(self, request: int) -> int:
        return int(self.work.prompt[request]) + self.done[request]

    def finish(self, stage: dict[str, Any], batch: list[Any], now: float) -> None:
        stage["busy"], stage["now"] = False, 0
        last, behind = stage["rank"] == stage["pp"] - 1, stage["next"]
        woken = [stage, behind]
        for each in batch:
            if isinstance(each, tuple):
                if not last:
                    behind["prompts"].append(each)
                    continue
                self.ttft[each[0]] = now
                target = behind if self.keeps else min((o[0] for o in self.others), key=lambda o: len(o["decodes"]))
                target["decodes"].append(each[0])
                woken.append(target)
                continue
            self.done[each] += last
            if self.done[each] == self.work.output[each]:
                self.ended[each] = now
            else:
                behind["decodes"].append(each)
        for one in woken:
            self.start(one, now)


def few(number: int, rate: float, seed: int, longest: int = 1200, output: int = 60) -> Workload:
    draw = random.Random(seed)
    return sample(
        [(draw.randrange(1, longest), draw.randrange(1, output)) for _ in range(number)], rate, number, seed=seed
    )


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("rate", [1.0, 6.0, 40.0])
@pytest.mark.parametrize(
    "placement",
    [
        Placement(MODEL, (1, 1), (1, 1)),
        Placement(MODEL, (2, 2), (1, 2)),
        Placement(MODEL, (1, 4), (2, 4)),
        Placement(MODEL, (2, 1), (1, 2), prefills=2, decodes=3),
        Placement(MODEL, (1, 1)),
        Placement(MODEL, (2, 2)),
        Placement(MODEL, (1, 4), prefills=2),
    ],
    ids=lambda one: f"{one.name} x{one.prefills}",
)
def test_runs_of_steps_are_the_steps(
    placement: Placement, rate: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A budget that the faster ones overflow, so that batches rotate, and a cache that some prompts have to wait for.
    monkeypatch.setattr(ring, "TOKEN_BUDGET", 9000)
    monkeypatch.setattr("vllm_suite.planner.distserve.parity.kv_tokens", lambda *_: 3000)
    work = few(80, rate, seed)
    ours, exact = simulate(placement, work), Tokens(placement, work, 9000, 3000).run()
    assert ours.ttft == pytest.approx(exact.ttft, rel=1e-9)
    assert ours.tpot == pytest.approx(exact.tpot, rel=1e-9)


def test_many_sequences_take_the_coefficients_of_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    work = few(260, 200.0, 3, longest=40, output=50)
    placement = Placement(MODEL, (1, 1), (1, 1))
    exact = Tokens(placement, work, 50_000, 66_144).run()
    assert simulate(placement, work).tpot == pytest.approx(exact.tpot, rel=1e-9)


def test_what_waits_presses_back_on_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    # The second prompt arrives while the first request decodes; with more keys waiting than allowed it is left alone.
    work = Workload(np.array([0.0, 200.0]), np.array([400, 400]), np.array([30, 1]))
    free = simulate(Placement(MODEL, (1, 1)), work)
    monkeypatch.setattr(ring, "BACK_PRESSURE", 10)
    pressed = simulate(Placement(MODEL, (1, 1)), work)
    assert pressed.ttft[1] > work.output[0] * 20 > free.ttft[1]
    # With two stages the first one is idle, and nothing waits there, while the second decodes.
    assert simulate(Placement(MODEL, (1, 2)), work).ttft[1] < 200


def test_one_request_by_hand() -> None:
    a, b, c = distserve(MODEL, 2).coefficients.prefill
    d, e, f = distserve(MODEL, 1).coefficients.decode_small
    found = simulate(Placement(MODEL, (2, 2), (1, 1)), Workload(np.zeros(1), np.array([100]), np.array([2])))
    # Two stages at half the time and two milliseconds each; the first has the overhead.
    assert found.ttft[0] == pytest.approx((a + 100 * b + 100**2 * c) + 2 * 2 + 2.01, rel=1e-12)
    # Contexts of 101 and 102 keys, the overhead of 100 and 101; over two tokens.
    assert found.tpot[0] == pytest.approx(d + 101.5 * e + f + 2 + 1e-4 * 100.5, rel=1e-12)


def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workload(np.zeros(1), np.array([100]), np.array([2]))
    with pytest.raises(SourceError, match="TP3"):
        simulate(Placement(MODEL, (3, 1), (1, 1)), work)
    with pytest.raises(ValueError, match="tp 1, pp 3"):
        simulate(Placement(MODEL, (1, 1), (1, 3)), work)
    with pytest.raises(ValueError, match="70000 tokens does not fit in a cache of 66144"):
        simulate(Placement(MODEL, (1, 1)), Workload(np.zeros(1), np.array([70_000]), np.array([2])))
    with pytest.raises(ValueError, match="never decodes"):
        simulate(Placement(MODEL, (1, 1)), Workload(np.zeros(1), np.array([60_000]), np.array([2])))


def test_a_sample_is_without_replacement_and_begins_at_zero() -> None:
    lengths = [(number, 1) for number in range(1, 101)]
    work = sample(lengths, 4.0, 100, seed=5)
    assert sorted(work.prompt.tolist()) == list(range(1, 101))
    assert work.prompt.tolist() != list(range(1, 101))
    assert work.arrival[0] == 0
    many = sample(lengths * 100, 4.0, 10_000, seed=5, cv=2.0)
    gaps = np.diff(many.arrival) / 1000
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(2.0, rel=0.05)


def test_capacities_have_a_closed_form() -> None:
    rows = list(measured())
    assert len(rows) == 76
    for model, tp, pp, tokens in rows:
        assert tokens == pytest.approx(closed_form(model, tp * pp), rel=1.5e-3)
    assert kv_tokens(MODEL, 2, 1) == 163_008


def test_both_affinities_search_pairs() -> None:
    names = [each.name for each in pairs(MODEL, 1, 4)]
    assert len(names) == 9
    assert names == [each.name for each in pairs(MODEL, 1, 4, high_affinity=True)]
    assert len(list(pairs("facebook/opt-66b", 1, 8))) == 18
    # Pipelines over two nodes: a segment of prefill and one of decode in each.
    wide = {each.name for each in pairs(MODEL, 2, 4)}
    assert "2,2|1,4" in wide
    assert "4,1|4,1" not in wide
    assert "4,1|4,1" in {each.name for each in pairs(MODEL, 2, 4, high_affinity=True)}
    assert {each.name for each in colocated(MODEL, 4)} == {"1,1", "1,2", "1,4", "2,1", "2,2", "4,1"}


def test_bisection_and_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    # A placement passes up to two requests per second and GPU, but for one that never does.
    def pretend(placement: Placement, work: Workload) -> Latencies:
        rate = (len(work.arrival) - 1) * 1000 / work.arrival[-1]
        late = rate > 2 * placement.gpus or placement.prefill == (4, 1)
        return Latencies(np.full(10, 1e4 if late else 1.0), np.ones(10))

    monkeypatch.setattr("vllm_suite.planner.distserve.search.simulate", pretend)
    lengths, question = [(1, 1)] * 20_000, Question(200, 100, count=20_000)
    placements = [Placement(MODEL, (4, 1)), Placement(MODEL, (2, 1)), Placement(MODEL, (1, 1))]
    found = search(iter(placements), lengths, question)
    assert [found.rates[each] for each in placements] == [0.0, 1.875, 1.875]
    assert found.best == placements[2]
    assert found.runs == 15
    assert found.ranking() == [(1.875, placements[1:]), (0.0, placements[:1])]


def test_each_percentile_is_tested_by_itself() -> None:
    question = Question(100, 100)
    first = np.where(np.arange(100) < 9, 500.0, 1.0)
    # Nine late at the start and nine others slow: neither percentile notices, jointly 18 % miss.
    found = Latencies(first, first[::-1])
    assert question.passes(found)
    assert found.attainment(100, 100) == (91.0, 91.0, 82.0)
    assert not Question(1.0, 100).passes(found)


def lengths() -> list[tuple[int, int]]:
    path = DATA / "traces" / "AzureLLMInferenceTrace_2023_conv.csv"
    if not path.is_file():
        pytest.skip(f"no {path}; set VLLM_SUITE_DATA")
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    return [row for row in rows if sum(row) < 2048]


def outputs(name: str) -> Any:
    path = DATA / "measured" / "distserve" / name
    if not path.is_file():
        pytest.skip(f"no {path}; set VLLM_SUITE_DATA")
    return json.loads(path.read_text(encoding="utf-8"))


def test_its_44_rows_come_out_to_the_last_digit() -> None:
    rows, proxy = outputs("attainment_curves.json"), lengths()
    assert len(rows) == 44
    assert len(proxy) == 16_525
    known: dict[tuple[Placement, float], Latencies] = {}
    for row in rows:
        a, b, c, d = row["config"]
        placement = Placement(f"facebook/{row['model']}", (a, b), (c, d) if c else None)
        if (placement, row["rate"]) not in known:
            known[placement, row["rate"]] = simulate(placement, sample(proxy, row["rate"], 300))
        found = known[placement, row["rate"]]
        half, most = found.quantile(0.5), found.quantile(0.9)
        published = [row[key] for key in ("ttft_p50", "ttft_p90", "tpot_p50", "tpot_p90")]
        assert [round(half[0], 1), round(most[0], 1), round(half[1], 2), round(most[1], 2)] == published
        shares = [row[key] for key in ("ttft_att", "tpot_att", "both_att")]
        assert [round(each, 2) for each in found.attainment(*row["slo_ms"])] == shares


@pytest.mark.parametrize(
    ("name", "most"), [("opt13b_low_1x4_200_100", 5), ("opt13b_vllm_1x4_200_100", 5), ("opt66b_low_1x8_2500_150", 1)]
)
def test_its_searches_come_out(name: str, most: float) -> None:
    said, proxy = outputs(f"{name}.json"), lengths()
    model = said["model"]
    placements = pairs(model, 1, said["gpus_per_node"]) if said["backend"] == "distserve" else colocated(model, 4)
    question = Question(*said["slo_ms"], count=said["N"], most=most, resolution=said["esp"])
    found = search(placements, proxy, question)
    assert {str(each.config): rate for each, rate in found.rates.items()} == said["all"]
    assert found.best.config == tuple(said["best"]["config"])
    assert best_rate(found.best, proxy, question)[0] == said["best"]["per_gpu_rate"]
