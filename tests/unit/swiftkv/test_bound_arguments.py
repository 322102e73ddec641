"""The command line of the prefill benchmark, and how it judges what it measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from bench_swiftkv_prefill import decode_in_turns, kinds_of, parse, specs_of, summarise, targets
from swiftkv_engines import Timing


def timing(prefill: float, decode: float) -> Timing:
    return Timing(prefill, prefill, decode, decode, decode, [1, 2])


def measured(
    speedup: float, tpot: float, noise: tuple[float, ...] = (1, 3, 0.5, 1.2)
) -> tuple[Any, list[dict[str, Any]]]:
    """Rounds in which load slows all engines alike."""
    args = parse(["--lengths", "2000", "--kinds", "base,off,armed", "--turns", "1", "--decode-rounds", "2"])
    single = {
        "base": [timing(2.0 * slow, 0.01 * slow) for slow in noise],
        "off": [timing(2.0 * slow, 0.01 * slow) for slow in noise],
        "armed": [timing(2.0 / speedup * slow, 0.01 * tpot * slow) for slow in noise],
    }
    turns = {name: [(one.decode, one.decode_cpu) for one in timings] for name, timings in single.items()}
    return args, summarise(single, None, turns, args, 2000, 1)


def test_load_on_whole_rounds_cancels_out() -> None:
    _, rows = measured(1.8, 1.01)
    armed = rows[-1]
    assert armed["against_base"]["ttft_speedup"]["max"] == pytest.approx(1.8)
    assert armed["against_base"]["tpot_ratio"]["median"] == pytest.approx(1.01)
    assert armed["of_bound"] == pytest.approx(1.8 / armed["bound"])


def test_medians_of_rounds_and_starts_stand_beside_the_pooled_one() -> None:
    """Two starts of two rounds of three turns; an engine of the second start is faster, whatever the load."""
    args = parse(["--lengths", "2000", "--turns", "3", "--decode-rounds", "2"])
    tpot = [1.02, 1.04, 1.06, 1.0, 1.02, 1.04, *[0.9] * 6]
    load = [1, 5, 1, 2, 2, 7, 1, 3, 1, 1, 1, 4]
    turns = {
        "base": [(0.01 * slow, 0.01 * slow) for slow in load],
        "armed": [(0.01 * slow * ratio, 0.01 * slow * ratio) for slow, ratio in zip(load, tpot, strict=True)],
    }
    single = {name: [timing(1.0, 0.01)] for name in turns}
    versus = summarise(single, None, turns, args, 2000, 1)[-1]["against_base"]
    assert versus["tpot_ratio_by_round"] == pytest.approx([1.04, 1.02, 0.9, 0.9])
    assert versus["tpot_ratio_by_start"] == pytest.approx([1.03, 0.9])
    assert versus["tpot_ratio"]["median"] == pytest.approx(0.95)


class Alive:
    """An engine of which only the order of its turns counts."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order
        self.prompts: list[list[int]] = []

    def open(self, prompt: list[int], outputs: int) -> None:
        self.prompts.append(prompt)

    def steps(self, count: int) -> tuple[float, float]:
        self.order.append(self.name)
        return 0.01, 0.01

    def end(self) -> None:
        pass


def test_engines_take_turns_forth_and_back_with_a_request_of_its_own_in_each_round() -> None:
    args = parse(["--turns", "4", "--decode-rounds", "2"])
    order: list[str] = []
    alive: Any = {name: Alive(name, order) for name in ("base", "armed")}
    taken = decode_in_turns(alive, args, 9)
    assert {name: len(turns) for name, turns in taken.items()} == {"base": 8, "armed": 8}
    forth, back = ["base", "armed"], ["armed", "base"]
    assert order == [*back, *forth, *back, *forth, *back, *forth, *back, *forth, *back, *forth]
    assert alive["base"].prompts == alive["armed"].prompts
    assert alive["base"].prompts[0] != alive["base"].prompts[1]


@pytest.mark.parametrize(
    ("speedup", "tpot", "wanted"), [(1.7, 1.02, [True, True]), (1.5, 1.04, [False, False]), (1.7, 0.9, [True, True])]
)
def test_targets(speedup: float, tpot: float, wanted: list[bool]) -> None:
    args, rows = measured(speedup, tpot)
    assert list(targets(rows, args).values()) == wanted


def test_the_gpu_targets_are_those_of_the_8b_shape() -> None:
    args = parse(["--shape", "8b", "--lengths", "2048,8192"])
    assert targets([], args) == {
        "prefill_1.75_times_base_at_8192_tokens": None,
        "ttft_1.6_times_base_at_8192_tokens": None,
    }


def test_kinds_and_engines() -> None:
    words = ["--kinds", "base,off,armed", "--groups", "1,4", "--lengths", "16,100", "--output-tokens", "8"]
    args = parse([*words, "--turns", "2", "--threads", "1"])
    assert kinds_of(args.kinds, args.groups) == {
        "base": (None, 1),
        "off": (False, 1),
        "armed": (True, 1),
        "armed g4": (True, 4),
    }
    base, off, _, grouped = specs_of(args, 100)
    assert (base.skip, off.skip, grouped.skip) == (None, False, True)
    assert base.config["architectures"] == ["LlamaForCausalLM"]
    assert "num_key_value_layers" not in base.config
    assert grouped.config["architectures"] == ["LlamaSwiftKVForCausalLM"]
    assert (grouped.config["num_key_value_layers"], grouped.config["key_value_group_size"]) == (8, 4)
    assert base.options == off.options == grouped.options
    assert base.options["max_model_len"] == 100 + 20


@pytest.mark.parametrize(
    "argv",
    [
        ["--cut", "0"],
        ["--cut", "1"],
        ["--groups", "3"],
        ["--kv-heads", "5"],
        ["--lengths", "0"],
        ["--lengths", "x"],
        ["--kinds", "armed,fast"],
        ["--chunk", "0"],
        ["--shape", "9b"],
    ],
)
def test_bad_arguments_end_with_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(argv)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err
