"""What a row of the metrics table says: `SeriesSpec`, and `Label` for each of its labels."""

from __future__ import annotations

from itertools import product
from typing import Literal, NamedTuple


class Label(str):
    """A label's name, and what it can hold.

    Attributes:
        values: all of them, where they are a closed set.
        bound: why their number stays small, in words, where they are not.
    """

    values: tuple[str, ...] = ()
    bound: str = ""


def one_of(name: str, *values: str) -> Label:
    """A label with a closed set of values."""
    label = Label(name)
    label.values = tuple(str(value) for value in values)
    return label


def within(name: str, bound: str) -> Label:
    """A label whose values are bounded by something else: `bound` says by what."""
    label = Label(name)
    label.bound = bound
    return label


class SeriesSpec(NamedTuple):
    """One series.

    Attributes:
        name: as scraped; counters end in ``_total``.
        labels: own labels; those of the exporting process (`Group.common`) come before them.
        buckets: upper bounds, for histograms.
        known: label values that a process can count, where those are fewer than `labels` allow together, or are known
            although a label has no closed set.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()
    known: tuple[tuple[str, ...], ...] = ()

    def from_start(self) -> tuple[tuple[str, ...], ...]:
        """Label values of the series that a counter begins with, at 0; none where a label has no closed set.

        Of a series that appears with its first count Prometheus sees no increase.
        """
        return self.known or tuple(product(*(label.values for label in self.labels)))

    @property
    def unit(self) -> str:
        """What is counted: named at the end of the series, as Prometheus has it; "" for a plain count."""
        words = self.name.removesuffix("_total").split("_")
        if words[-2:] == ["per", "second"]:
            return f"{words[-3]}/s"
        return words[-1] if words[-1] in ("seconds", "bytes", "tokens", "rows", "blocks", "ratio") else ""


class Group(NamedTuple):
    """Series that one kind of process exports.

    Attributes:
        title: for the page.
        where: which process, and when.
        common: labels that the process puts before those of each series.
    """

    title: str
    where: str
    specs: tuple[SeriesSpec, ...]
    common: tuple[Label, ...] = ()
