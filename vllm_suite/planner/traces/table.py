"""Recorded requests in as little memory as they take: 16 bytes each, and 8 for each block of a prefix."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from vllm_suite.planner.traces.rows import Row

_CHUNK = 8192


class Table:
    """Rows as columns, and what is known of all of them: sums, ends, order and a hash.

    Beyond `kept` rows only the latter are updated; the rows of such a trace are read from its file each time.

    Attributes:
        count, prompts, outputs: rows, and tokens summed.
        first, last: arrivals; nan where there are none.
        ordered: whether every row arrived no earlier than the one before.
        zeros: rows without output; they are kept with one token.
        fingerprint: of arrivals since the first (to a microsecond), lengths and prefixes; empty until `close`.
    """

    def __init__(self, kept: int) -> None:
        self.kept, self.count, self.prompts, self.outputs, self.zeros = kept, 0, 0, 0, 0
        self.first = self.last = math.nan
        self.ordered, self.fingerprint = True, ""
        self._hash: Any = hashlib.sha256()
        self._arrivals, self._prompts, self._outputs = array("d"), array("i"), array("i")
        # Ids of all prefixes one after another, and where each row's end.
        self._ids, self._ends = array("q"), array("q")

    def add(self, row: Row) -> None:
        """The next row of the file. Raises OverflowError where a number is beyond 31 bits, an id beyond 63."""
        output = max(1, row.output)
        self.zeros += row.output < 1
        self._arrivals.append(row.arrival)
        self._prompts.append(row.prompt)
        self._outputs.append(output)
        self._ids.extend(row.prefix)
        self._ends.append(len(self._ids))
        if self.count == 0:
            self.first = self.last = row.arrival
        elif row.arrival < self.last:
            self.ordered, self.first = False, min(self.first, row.arrival)
        else:
            self.last = row.arrival
        self.count += 1
        self.prompts += row.prompt
        self.outputs += output
        if self.count > self.kept and self.count % _CHUNK == 0:
            self._digest()

    def _digest(self) -> None:
        """Hash the columns, and empty them where nobody will read them."""
        # Relative to the first row read, which for an ordered trace is the first to arrive.
        arrivals = np.frombuffer(self._arrivals)
        self._hash.update(np.round((arrivals - self.first) * 1e6).tobytes())
        for lengths in (self._prompts, self._outputs, self._ids):
            self._hash.update(lengths.tobytes())
        if self.count > self.kept:
            del arrivals
            for column in (self._arrivals, self._prompts, self._outputs, self._ids, self._ends):
                del column[:]

    def close(self) -> None:
        """All rows were added: sort them, unless they were not kept."""
        if not self.ordered and self.count <= self.kept:
            order = np.argsort(np.frombuffer(self._arrivals), kind="stable").tolist()
            rows = list(self.rows())
            for column in (self._arrivals, self._prompts, self._outputs, self._ids, self._ends):
                del column[:]
            for place in order:
                row = rows[place]
                self._arrivals.append(row.arrival)
                self._prompts.append(row.prompt)
                self._outputs.append(row.output)
                self._ids.extend(row.prefix)
                self._ends.append(len(self._ids))
        self._digest()
        # A hash object cannot go to another process, and a workload does.
        self.fingerprint, self._hash = self._hash.hexdigest()[:16], None

    def rows(self, seed: int = 0) -> Iterator[Row]:
        """All of them, if they were kept."""
        if not self._ids:
            yield from map(Row, self._arrivals, self._prompts, self._outputs)
            return
        begin = 0
        for arrival, prompt, output, end in zip(self._arrivals, self._prompts, self._outputs, self._ends, strict=True):
            yield Row(arrival, prompt, output, tuple(self._ids[begin:end]))
            begin = end
