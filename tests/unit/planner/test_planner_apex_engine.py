"""APEX's engine: schedules worked out by hand, the same with every iteration taken singly, its published outputs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vllm_suite.planner.apex.engine import Ask, simulate
from vllm_suite.planner.apex.kernels import Exchanges, attention_length, rounded
from vllm_suite.planner.apex.space import Block, Scheme
from vllm_suite.planner.apex.times import StageTimes
from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.sources.base import SourceError

BLOCK = Block(8, 4, 16, 128, 512, 3, 1, 1, 4, 2.0, 2.0)
MACHINE = cluster("4xH100-SXM")
ONE = Scheme(4, 1, (1, 1), (1, 1))


class Toy:
    """Products take a microsecond for each rounded token, attention 10 for each prompt and one for each 16 tokens."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def product(self, outputs: int, inputs: int, tokens: int) -> float:
        self.asked.append((outputs, inputs, tokens))
        return tokens / 4

    def attention(self, heads: int, head: int, batch: int, length: int) -> float:
        self.asked.append((heads, head, batch, length))
        return 10.0 * batch + length / 16


def moves(time: float = 0.0) -> Exchanges:
    """Every collective takes `time`, and 1 microsecond more for each KiB."""
    sizes = np.array([0.0, 1e6])
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p")
    return Exchanges({(kind, 1, count): (sizes, time + sizes) for kind in kinds for count in (2, 4)})


def times(scheme: Scheme, toy: Toy | None = None, collectives: float = 0.0) -> StageTimes:
    return StageTimes(BLOCK, scheme, toy or Toy(), moves(collectives), 4, 4)


def test_an_iteration_by_hand() -> None:
    toy = Toy()
    found = times(ONE, toy).microseconds(tokens=103, prompts=2, prompt_tokens=100, decoding=3)
    # 103 tokens are looked up as 128: five products of 32 us. Two prompts of 50 on average as 64; three decoded tokens
    # as prompts of 16, whatever their contexts.
    assert found == pytest.approx(4 * (5 * 32 + (20 + 4) + (30 + 1)))
    assert (3 * 8 * 16, 128, 128) in toy.asked  # Queries, keys and values as if every head had its own.
    assert (8, 16, 2, 64) in toy.asked
    assert (8, 16, 3, 16) in toy.asked


def test_rounding() -> None:
    assert [rounded(tokens) for tokens in (1, 64, 65, 128, 129)] == [64, 64, 128, 128, 256]
    assert [attention_length(mean) for mean in (1, 16, 16.5, 17.0)] == [16, 16, 16, 32]


def test_collectives_by_hand() -> None:
    # Attention twice on two devices each, the network once on four: 8 tokens of each replica, 16 in all, 256 B a token.
    scheme, quiet = Scheme(1, 1, (2, 2), (1, 4)), moves()
    assert quiet.microseconds("all_reduce", 2, 4, 8 * 128) == 2.0
    busy = times(scheme, collectives=100.0).microseconds(8, 0, 0, 8)
    compute = 4 * (5 * 16 + 81)
    # Scatter 8 tokens over two devices, gather 4 to all four; reduce 16, send 16 all to all, gather 16 on two: sizes
    # are of the whole vector, in KiB.
    kib = (8 + 4 * 4 + 16 + 16 + 16 * 2) * 256 / 1024
    assert busy == pytest.approx(compute + 4 * (5 * 100 + kib))


def test_stages_hand_over_once_an_iteration() -> None:
    flat, deep = times(Scheme(4, 1, (1, 1), (1, 1))), times(Scheme(2, 2, (1, 1), (1, 1)), collectives=7.0)
    assert deep.microseconds(4, 0, 0, 4) == pytest.approx(flat.microseconds(4, 0, 0, 4) / 2 + 7.0 + 1.0)


def test_a_trace_by_hand() -> None:
    step = times(ONE).microseconds(1, 0, 0, 1)
    first = times(ONE).microseconds(100, 1, 100, 0)
    one = replace(ONE, replicas=1)
    # The second arrives in the middle of the first's decode and is admitted with the next iteration.
    late = first + 3.5 * step
    found = simulate(one, BLOCK, MACHINE, Toy(), moves(), [Ask(0, 100, 6), Ask(late, 100, 1), Ask(late + 1e6, 30, 1)])
    assert found is not None
    both = times(ONE).microseconds(101, 1, 100, 1)
    last = times(ONE).microseconds(30, 1, 30, 0)
    # TTFT is the time of an iteration: waiting for it does not count.
    assert found.ttft_ms == pytest.approx((first + both + last) / 3 * 1e-3)
    assert found.tpot_ms == pytest.approx((4 * step + both) / 5 * 1e-3)
    # Waiting for the third does not count either, and neither does the last iteration: APEX's windows leave it out.
    assert found.busy_s == pytest.approx((first + 4 * step + both) * 1e-6)


def test_a_full_cache_pauses_the_last_of_the_running() -> None:
    # Room for 100 tokens: 40 + 40 prompt tokens and ten of each.
    tight = replace(BLOCK, layers=4)
    per_token = 2 * 4 * 16 * 2 * 4
    weights = ONE.weight_bytes(tight)
    small = MACHINE.model_copy(
        update={"device": MACHINE.device.model_copy(update={"memory_gib": (2**30 + weights + 100 * per_token) / 2**30})}
    )
    one = replace(ONE, replicas=1)
    asked = [Ask(0, 40, 30), Ask(0, 40, 30)]
    found = simulate(one, tight, small, Toy(), moves(), asked)
    assert found is not None
    step = [times(ONE).microseconds(count, 0, 0, count) for count in (1, 2)]
    first = times(ONE).microseconds(80, 2, 80, 0)
    # Both decode ten tokens; then one goes on alone, and the other where it left off when that is done, computing
    # nothing again: 19 iterations each, of which the windows leave the last out.
    assert found.busy_s == pytest.approx((first + 10 * step[1] + 19 * step[0] + 18 * step[0]) * 1e-6)
    assert simulate(one, tight, small, Toy(), moves(), [Ask(0, 101, 1)]) is None


def test_replicas_stages_and_cells_share_requests_in_turn() -> None:
    asked = [Ask(0, 64 if number % 4 == 3 else 32, 1) for number in range(16)]
    found = simulate(Scheme(4, 1, (1, 1), (1, 1)), BLOCK, MACHINE, Toy(), moves(), asked)
    alone = simulate(Scheme(4, 1, (1, 1), (1, 1)), BLOCK, MACHINE, Toy(), moves(), [Ask(0, 32, 1)] * 16)
    assert found is not None
    assert alone is not None
    # Every fourth request is long, so the fourth replica has them all; APEX's records of the replicas overwrite each
    # other, and the last, with the long ones, stays.
    assert found.ttft_ms == pytest.approx(times(ONE).microseconds(256, 4, 256, 0) * 1e-3)
    assert alone.ttft_ms < found.ttft_ms


def test_pipelines_are_as_slow_as_the_slowest_of_a_window() -> None:
    two = Scheme(1, 2, (1, 1), (1, 1))
    # One request each for both micro-batches: 2 tokens and 4 tokens of output, equal prompts.
    found = simulate(two, BLOCK, MACHINE, Toy(), moves(), [Ask(0, 64, 2), Ask(0, 64, 4)])
    assert found is not None
    stage = times(Scheme(2, 2, (1, 1), (1, 1)))
    prompt, step = stage.microseconds(64, 1, 64, 0), stage.microseconds(1, 0, 0, 1)
    # Interleaved p p s s s s: four windows of two, of which the first two see a prompt.
    assert found.busy_s == pytest.approx((2 * prompt + 2 * step) * 1e-6)
    assert found.ttft_ms == pytest.approx(2 * prompt * 1e-3)


def test_runs_of_iterations_are_the_same_as_single_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    arrivals = np.cumsum(random.exponential(3000, 120))
    asked = [Ask(float(at), int(random.integers(1, 300)), int(random.integers(1, 60))) for at in arrivals]
    schemes = [Scheme(1, 1, (4, 1), (1, 4)), Scheme(2, 2, (1, 1), (1, 1)), Scheme(1, 1, (1, 4), (2, 2))]
    runs = [simulate(each, BLOCK, MACHINE, Toy(), moves(5.0), asked) for each in schemes]
    monkeypatch.setattr("vllm_suite.planner.apex.engine.ceil", lambda number: 1)
    for scheme, run in zip(schemes, runs, strict=True):
        # With arrivals always one iteration away, and one far away for the end, each iteration is taken singly.
        single = simulate(scheme, BLOCK, MACHINE, Toy(), moves(5.0), asked)
        assert run is not None
        assert single is not None
        for name in ("ttft_ms", "tpot_ms", "gap_p95_ms", "latency_p50_s", "latency_p95_s", "busy_s"):
            assert getattr(single, name) == pytest.approx(getattr(run, name), rel=1e-9), name


def every_iteration(asked: list[Ask], capacity: int) -> list[float]:
    """One replica by APEX's rules with a list for everything, an iteration at a time; microseconds of each."""
    stage, clock, found = times(ONE), 0.0, []
    coming, running, paused = list(range(len(asked))), list[int](), list[int]()
    tokens: dict[int, int] = {}  # In the cache, by request.
    made = dict.fromkeys(range(len(asked)), 0)

    def cached() -> int:
        # APEX gives back one token too many for each that waits, and takes it again when that goes on.
        return sum(tokens.values()) - len(paused)

    while coming or running or paused:
        decoding = 0
        for number in list(running):
            if number not in running:
                continue
            while cached() + 1 > capacity:
                last = running[-1]
                running.remove(last)
                paused.append(last)
                del tokens[last]
                if last == number:
                    break
            else:
                tokens[number] += 1
                decoding += 1
        paused.sort()
        while paused:
            whole = asked[paused[0]].prompt + made[paused[0]]
            if cached() + whole + 1 > capacity:
                break
            tokens[paused[0]] = whole
            running.append(paused.pop(0))
            decoding += 1
        prompts = []
        while coming and not paused and asked[coming[0]].arrival <= clock:
            if cached() + asked[coming[0]].prompt > capacity:
                break
            tokens[coming[0]] = asked[coming[0]].prompt
            prompts.append(asked[coming[0]].prompt)
            running.append(coming.pop(0))
        if not running:
            clock = asked[coming[0]].arrival
            continue
        found.append(stage.microseconds(decoding + sum(prompts), len(prompts), sum(prompts), decoding))
        clock += found[-1]
        for number in list(running):
            made[number] += 1
            if made[number] >= asked[number].output:
                running.remove(number)
                del tokens[number]
    return found


@pytest.mark.parametrize("room", [400, 700, 1500])
def test_a_small_cache_beside_every_iteration_taken_singly(room: int) -> None:
    random = np.random.default_rng(room)
    arrivals = np.cumsum(random.exponential(900, 60))
    asked = [Ask(float(at), int(random.integers(1, 200)), int(random.integers(1, 90))) for at in arrivals]
    one, per_token = replace(ONE, replicas=1), 2 * 4 * 16 * 2 * 4
    memory = (2**30 + ONE.weight_bytes(BLOCK) + room * per_token) / 2**30
    small = MACHINE.model_copy(update={"device": MACHINE.device.model_copy(update={"memory_gib": memory})})
    found, expected = simulate(one, BLOCK, small, Toy(), moves(), asked), every_iteration(asked, room)
    assert found is not None
    assert found.busy_s == pytest.approx(sum(expected[:-1]) * 1e-6, rel=1e-9)
    roomy = simulate(one, BLOCK, MACHINE, Toy(), moves(), asked)
    assert roomy is not None
    assert found.busy_s > 1.01 * roomy.busy_s  # The cache was full.


def test_profiles_are_read_and_refused(tmp_path: Path) -> None:
    head = "gpu,num_nodes,num_gpus_per_node,dtype,size(kb),time(us)\n"
    for name in ("all_reduce", "all_gather", "reduce_scatter", "alltoall", "sendrecv"):
        (tmp_path / f"{name}.csv").write_text(head + "X,1,2,half,0,8\nX,1,2,half,4,16\nX,1,2,float,4,99\n")
    found = Exchanges.read(tmp_path)
    assert found.microseconds("all_reduce", 2, 8, 1024) == 12.0
    assert found.microseconds("all_reduce", 2, 8, 1024 + 511) == 12.0  # Whole KiB.
    assert found.microseconds("all_reduce", 2, 8, 16 * 1024) == 8 * 16.0
    assert found.microseconds("all_reduce", 1, 8, 1024) == 0.0
    with pytest.raises(SourceError, match="all_gather over 1 x 4 devices"):
        found.microseconds("all_gather", 4, 8, 1024)
    (tmp_path / "sendrecv.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SourceError, match="not one of APEX's profiles"):
        Exchanges.read(tmp_path)
    (tmp_path / "sendrecv.csv").unlink()
    with pytest.raises(SourceError, match="microsoft/apex_plus"):
        Exchanges.read(tmp_path)


def test_apexs_own_outputs() -> None:
    """Within 2 % for TTFT, TPOT and busy time of 26 plans on three traces; see docs/planner/apex.md for the folder."""
    from vllm_suite.planner.validation.apex import PROFILES, parity

    data = Path(os.environ.get("VLLM_SUITE_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data")
    found = list(parity(data))
    if any(each.verdict == "not run" for each in found):
        pytest.skip(f"{found[0].note} ({PROFILES})")
    assert len(found) == 9
    assert [each for each in found if each.verdict != "holds"] == []
