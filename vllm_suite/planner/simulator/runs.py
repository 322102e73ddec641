"""Runs of equal blocks of cache, and the order in which free ones are taken."""

from __future__ import annotations


class Run:
    """Blocks `low` to before `high` of one piece of content, all held by the same jobs.

    Attributes:
        node: the piece; None where nobody will ask for it again.
        refs: jobs that hold them; free at 0, then between `before` and `after` in the order in which they are taken.
        rest: what was cut off behind it.
    """

    __slots__ = ("after", "before", "high", "low", "node", "refs", "rest")

    def __init__(self, node: Node | None, low: int, high: int, refs: int) -> None:
        self.node, self.low, self.high, self.refs = node, low, high, refs
        self.rest: Run | None = None
        self.before: Run | None = None
        self.after: Run | None = None


class Node:
    """A piece of content after another one: the blocks of one id of a request's prefix."""

    __slots__ = ("id", "next", "parent", "runs")

    def __init__(self, parent: Node | None, id_: int) -> None:
        self.parent, self.id = parent, id_
        self.next: dict[int, Node] = {}
        # In the order in which their blocks became findable; of equal ones the first is found.
        self.runs: list[Run] = []


class FreeRuns:
    """Free runs whose contents are known, first the one to be taken first: a list with both ends in `ends`."""

    def __init__(self) -> None:
        self.ends = Run(None, 0, 0, 0)
        self.ends.before = self.ends.after = self.ends

    def cut(self, run: Run, at: int) -> Run:
        """Cut a run in two before block `at`; returns the second."""
        rest = Run(run.node, at, run.high, run.refs)
        rest.rest, run.rest, run.high = run.rest, rest, at
        if run.node is not None:
            run.node.runs.insert(run.node.runs.index(run) + 1, rest)
        if not run.refs:
            before = run.before
            assert before is not None
            rest.before, rest.after = before, run
            before.after = run.before = rest
        return rest

    def append(self, run: Run) -> None:
        last = self.ends.before
        assert last is not None
        run.before, run.after = last, self.ends
        last.after = self.ends.before = run

    def unlink(self, run: Run) -> None:
        before, after = run.before, run.after
        assert before is not None
        assert after is not None
        before.after, after.before = after, before
        run.before = run.after = None

    def prune(self, node: Node | None) -> None:
        """Forget pieces of which nothing is left."""
        while node is not None and node.parent is not None and not node.runs and not node.next:
            node.parent.next.pop(node.id, None)
            node = node.parent
