"""The judges of answers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vllm_dler.train.grading import TrainError, last_boxed, make_judge


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("so</think> \\boxed{42}", "42", 1),
        ("so</think> \\boxed{42.0}", "42", 1),
        ("so</think> \\boxed{41}", "42", 0),
        ("\\boxed{42} so", "42", 0),  # the reasoning never ended
        ("\\boxed{42}</think> so 42", "42", 0),  # only what follows it counts
        ("</think>\\boxed{1} no, \\boxed{2}", "2", 1),
        ("</think>\\boxed{\\frac{3}{4}}", "0.75", 1),
        ("</think>\\boxed{\\dfrac{6}{8}}", "\\frac{3}{4}", 1),
        ("</think>\\boxed{1,234}", "1234", 1),
        ("</think>\\boxed{(1, 2)}", "(1,2)", 1),
        ("</think>\\boxed{12,34}", "1234", 0),
        ("</think>\\boxed{\\text{(A)}}", "(a)", 1),
        ("</think>\\boxed{\\text{(A)}}", "\\text{(B)}", 0),
        ("</think>\\boxed{x^2 + 1}", "x^2+1", 1),
        ("</think>\\boxed{50\\%}", "50", 1),
        ("</think>\\boxed{1/0}", "1", 0),
        ("</think>\\boxed{}", "0", 0),
        ("</think>\\boxed{7", "7", 0),  # cut off
        ("</think>the answer is 42", "42", 0),
        ("</think>\\boxed{42}", "\\boxed{42}", 1),
    ],
)
def test_boxed(text: str, answer: str, score: float) -> None:
    assert make_judge("boxed", "</think>")(text, answer, {}) == score


def test_without_a_mark_the_whole_text_is_judged() -> None:
    assert make_judge("boxed", None)("\\boxed{42} so", "42", {}) == 1


def test_nested_braces() -> None:
    assert last_boxed("\\boxed{\\sqrt{\\frac{1}{2}}}") == "\\sqrt{\\frac{1}{2}}"


@pytest.mark.timeout(60)  # a power of that size takes far longer
def test_a_huge_exponent_is_no_number() -> None:
    assert make_judge("boxed", None)("\\boxed{1e999999999}", "1e999999998", {}) == 0


def test_a_judge_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_judge.py").write_text("def half(text, answer, row):\n    return 0.5 * (row['key'] == 'x')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert make_judge("my_judge:half", None)("", "", {"key": "x"}) == 0.5
    sys.modules.pop("my_judge")


@pytest.mark.parametrize("name", ["nonsense", "json:nothing", "no_such_module:x", ":x"])
def test_a_judge_that_is_not_there(name: str) -> None:
    with pytest.raises(TrainError, match=r"package\.module:function"):
        make_judge(name, None)
