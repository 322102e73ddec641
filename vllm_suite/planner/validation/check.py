"""One line of the validation table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["holds", "missed", "not run"]


@dataclass(frozen=True)
class Check:
    """A prediction beside its reference.

    Attributes:
        id: of the list of checks, for example ``A2``.
        what: case and quantity, with its unit.
        ours: predicted; None where it was not run.
        reference: measured, published or exact.
        origin: of the reference: who measured or published it.
        error: between both; relative, or in the unit that `tolerance` has.
        tolerance: the largest error that holds, as text beside its number: ``3 %``, ``2 points``, ``exact``.
        verdict: whether it holds.
        others: what other tools say of the same quantity, by their names.
        note: what a reader has to know: what was fitted on what, or why it was not run.
    """

    id: str
    what: str
    ours: Any
    reference: Any
    origin: str
    error: float | None
    tolerance: str
    verdict: Verdict
    others: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """For the result file."""
        return asdict(self)


def relative(id: str, what: str, ours: float, reference: float, origin: str, tolerance: float, **more: Any) -> Check:
    """A check of a relative error; `tolerance` is a share."""
    error = ours / reference - 1.0
    verdict: Verdict = "holds" if abs(error) <= tolerance else "missed"
    return Check(id, what, ours, reference, origin, error, f"{tolerance:.3g}", verdict, **more)


def not_run(id: str, what: str, why: str, origin: str = "") -> Check:
    """A check whose data or tool is not here."""
    return Check(id, what, None, None, origin, None, "", "not run", note=why)
