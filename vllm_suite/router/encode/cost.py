"""How many embedding rows an item will become, learned from what encoders answer."""

from __future__ import annotations

from vllm_suite.router.encode.parts import Item

# First guesses, rows per unit: patches of 14 pixels merged two by two, 25 rows a second, and files of usual density.
_GUESS = {
    ("image", "pixels"): 1 / 784,
    ("image", "bytes"): 1 / 128,
    ("audio", "seconds"): 25.0,
    ("audio", "bytes"): 1 / 640,
    ("video", "bytes"): 1 / 512,
}
_MAX_ROWS = 1 << 20
_KEEP = 0.97  # weight that an observation loses with each later one
_MAX_FITS = 1024


class _Fit:
    """rows = a + b * amount by least squares over recent answers.

    Families of a fixed number of rows per image come out with b = 0, those that scale with the area with a = 0.
    """

    __slots__ = ("n", "x", "xx", "xy", "y")

    def __init__(self) -> None:
        self.n = self.x = self.y = self.xx = self.xy = 0.0

    def add(self, amount: float, rows: float) -> None:
        self.n = self.n * _KEEP + 1
        self.x = self.x * _KEEP + amount
        self.y = self.y * _KEEP + rows
        self.xx = self.xx * _KEEP + amount * amount
        self.xy = self.xy * _KEEP + amount * rows

    def rows(self, amount: float) -> float:
        spread = self.n * self.xx - self.x * self.x
        if spread > 1e-6 * self.n * self.xx:
            slope = max((self.n * self.xy - self.x * self.y) / spread, 0.0)
            return max((self.y - slope * self.x) / self.n + slope * amount, 1.0)
        return amount * self.y / self.x  # one size so far


class Costs:
    """Estimates per model, modality and unit."""

    def __init__(self) -> None:
        self._fits: dict[tuple[str | None, str, str], _Fit] = {}

    def estimate(self, model: str | None, item: Item) -> int:
        """Rows, at least 1."""
        fit = self._fits.get((model, item.modality, item.unit))
        rows = fit.rows(item.units) if fit else item.units * _GUESS[item.modality, item.unit]
        # Not a number either, where lengths beyond all reason have been learned.
        return max(round(rows), 1) if rows < _MAX_ROWS else _MAX_ROWS

    def learn(self, model: str | None, item: Item, rows: int) -> None:
        """An encoder made so many rows of this item."""
        if rows <= 0 or item.units <= 0:
            return
        key = (model, item.modality, item.unit)
        fit = self._fits.get(key)
        if fit is None:
            if len(self._fits) >= _MAX_FITS:  # model names come from clients
                self._fits.pop(next(iter(self._fits)))
            fit = self._fits[key] = _Fit()
        fit.add(item.units, rows)
