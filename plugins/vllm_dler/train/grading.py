r"""Judges of an answer: 1 for a right one, 0 for a wrong one.

The rule of the paper's training data: reasoning, its closing mark, then the answer in ``\boxed{...}``. ``boxed``
compares it as a number where both are numbers and as normalised text elsewhere; ``math-verify`` asks that package,
which knows equivalent LaTeX; ``package.module:function`` is a judge of one's own.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

Judge = Callable[[str, str, Mapping[str, Any]], float]
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_WORDS = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}")
_NOISE = re.compile(r"\\(?:left|right|!|,|;|:| )|\$|\\%|%|°|\^\{?\\circ\}?")
_NUMBER = re.compile(r"[+-]?(\d{1,60}(\.\d{0,60})?|\.\d{1,60})(/\d{1,60})?")  # no exponent: 1e9999999 takes minutes
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))")


class TrainError(ValueError):
    """A setting, a file or a state that training cannot work with. The text is meant for the person who gave it."""


def make_judge(name: str, think_end: str | None) -> Judge:
    """The judge called ``name``: of an answer's text, the right answer and the row it came from.

    Args:
        think_end: what ends the reasoning; an answer without it is wrong, and only what follows it is judged. None
            judges the whole text. A judge of one's own gets the text as it is.

    Raises TrainError for a judge that is not there.
    """
    if name == "boxed":
        return lambda text, answer, row: float(_same(_boxed_part(text, think_end), answer))
    if name == "math-verify":
        return _math_verify(think_end)
    module, _, function = name.partition(":")
    try:
        judge: Judge = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise TrainError(
            f"judge {name!r}: {error}; give boxed, math-verify, or your own as package.module:function"
        ) from error
    return judge


def after_thinking(text: str, think_end: str | None) -> str | None:
    """What follows the last ``think_end``; None where it is missing."""
    if think_end is None:
        return text
    _, found, rest = text.rpartition(think_end)
    return rest if found else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` whose braces close; None where there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin + 1 : i]
    return None


def _boxed_part(text: str, think_end: str | None) -> str | None:
    rest = after_thinking(text, think_end)
    return None if rest is None else last_boxed(rest)


def _same(given: str | None, answer: str) -> bool:
    if given is None:
        return False
    right = last_boxed(answer) or answer
    numbers = _number(given), _number(right)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return _normal(given) == _normal(right)


def _normal(text: str) -> str:
    text = _LATEX_FRACTION.sub(r"\1/\2", _WORDS.sub(r"\1", text.strip()))
    text = _THOUSANDS.sub("", _NOISE.sub("", text))
    return re.sub(r"\s+", "", text).rstrip(".").lower()


def _number(text: str) -> Fraction | None:
    text = _normal(text)
    if not _NUMBER.fullmatch(text):
        return None
    above, _, below = text.partition("/")
    return Fraction(above) / Fraction(below or 1) if Fraction(below or 1) else None


def _math_verify(think_end: str | None) -> Judge:
    try:
        from math_verify import parse, verify
    except ModuleNotFoundError as error:
        raise TrainError("judge math-verify: not installed here, pip install 'math-verify[antlr4_13_2]'") from error

    def judge(text: str, answer: str, row: Mapping[str, Any]) -> float:
        given = _boxed_part(text, think_end)
        if given is None:
            return 0.0
        return float(verify(parse(f"\\boxed{{{answer}}}"), parse(f"\\boxed{{{given}}}")))

    return judge
