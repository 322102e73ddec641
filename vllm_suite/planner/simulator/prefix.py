"""Blocks of cache that are found again by their contents: vLLM's prefix cache, counted in runs of blocks.

Rules of vllm/v1/core/block_pool.py and kv_cache_manager.py, 0.32: a block is found once it is full; a free one stays
findable until it is taken; blocks without known contents are taken first, then those that were freed first, of one
request the last ones first; of a prompt that is all there the last token is computed again, and with it its block.
"""

from __future__ import annotations

from typing import NamedTuple

from vllm_suite.planner.simulator.jobs import Job, SimulationError
from vllm_suite.planner.simulator.runs import FreeRuns, Node, Run


class _Piece(NamedTuple):
    """Blocks `low` to before `high` of a piece of content; they may have been cut into several runs, `run` first."""

    run: Run
    low: int
    high: int


class _Held:
    """What a job holds of shared content, and what it may find of its own.

    Attributes:
        shared: blocks of its prompt that others may share, from the start.
        per: blocks of an id.
        done: how many of the shared ones it holds, as `pieces`.
        node: the last piece of content among them.
        lost: free blocks of its own content after the shared one.
    """

    __slots__ = ("done", "lost", "node", "per", "pieces", "shared")

    def __init__(self, shared: int, per: int, root: Node) -> None:
        self.shared, self.per, self.done, self.node = shared, per, 0, root
        self.pieces: list[_Piece] = []
        self.lost: Run | None = None


class PrefixCache:
    """Who holds which contents, and in which order free blocks are taken.

    Blocks in use whose contents no other request can have are not told apart: a job's own cost nothing while it runs,
    and with requests without prefixes hardly anything is kept. Memory follows the blocks, not the trace.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._blank = blocks
        self._root = Node(None, 0)
        self._jobs: dict[int, _Held] = {}
        self._free = FreeRuns()
        self._match: list[_Piece] = []
        self._own = 0

    def take(self, count: int) -> None:
        """Blocks are given out; what was in them is lost."""
        if count <= self._blank:
            self._blank -= count
            return
        count -= self._blank
        self._blank = 0
        ends = self._free.ends
        while count:
            run = ends.after
            assert run is not None
            assert run is not ends
            here = run.high - run.low
            if here > count:
                run.high -= count
                return
            count -= here
            run.high = run.low
            self._free.unlink(run)
            if run.node is not None:
                run.node.runs.remove(run)
                self._free.prune(run.node)

    def find(self, job: Job, target: int) -> tuple[int, int]:
        """Blocks at the start of a waiting job's tokens that need no computing, and how many of them are free.

        Args:
            target: tokens that it has.

        Raises:
            SimulationError: an id stands for tokens that are not whole blocks.
        """
        held = self._jobs.get(job.number)
        if held is None:
            held = self._jobs[job.number] = self._register(job)
        match = self._match
        match.clear()
        self._own = 0
        limit = (target - 1) // self.block_size
        position, most, idle = 0, min(limit, held.shared), 0
        node, per = self._root, held.per
        for id_ in job.prefix:
            if position >= most:
                break
            following = node.next.get(id_)
            if following is None:
                break
            node = following
            want = min(per, most - position)
            got = self._cover(node, want)
            position += got
            if got < per:
                break
        for piece in match:
            if not piece.run.refs:
                idle += piece.high - piece.low
        if held.lost is not None and position == held.shared:
            self._own = min(limit - position, held.lost.high - held.lost.low)
            position += self._own
            idle += self._own
        return position, idle

    def _register(self, job: Job) -> _Held:
        if not job.prefix:
            return _Held(0, 1, self._root)
        per, odd = divmod(job.block, self.block_size)
        if odd or not per:
            raise SimulationError(
                f"request {job.number}: an id of its prefix stands for {job.block} tokens, which have to be a multiple"
                f" of the block size {self.block_size}"
            )
        return _Held(min(len(job.prefix) * per, job.prompt // self.block_size), per, self._root)

    def _cover(self, node: Node, want: int) -> int:
        """Append what is there of the first `want` blocks of a piece; how many follow one another from the start."""
        position, runs = 0, node.runs
        while position < want:
            end = want
            for run in runs:
                if run.low <= position < run.high:
                    end = min(end, run.high)
                    self._match.append(_Piece(run, position, end))
                    break
                if position < run.low < end:
                    # From there on this one is found first.
                    end = run.low
            else:
                break
            position = end
        return position

    def adopt(self, job: Job) -> None:
        """The job of the last `find` is admitted: it holds what was found."""
        held = self._jobs[job.number]
        for run, low, high in self._match:
            while run.high <= low:
                assert run.rest is not None
                run = run.rest
            if run.low < low:
                run = self._free.cut(run, low)
            if run.high > high:
                self._free.cut(run, high)
            if not run.refs:
                self._free.unlink(run)
            run.refs += 1
            held.pieces.append(_Piece(run, low, high))
            held.done += high - low
            assert run.node is not None
            held.node = run.node
        if self._own:
            assert held.lost is not None
            held.lost.low += self._own
            if held.lost.low == held.lost.high:
                self._free.unlink(held.lost)
        held.lost = None

    def commit(self, job: Job, tokens: int) -> None:
        """So many tokens of the job are computed, or about to be: the shared ones can be found by others."""
        held = self._jobs[job.number]
        most = min(held.shared, tokens // self.block_size)
        per = held.per
        while held.done < most:
            index, offset = divmod(held.done, per)
            if not offset:
                id_ = job.prefix[index]
                node = held.node.next.get(id_)
                if node is None:
                    node = held.node.next[id_] = Node(held.node, id_)
                held.node = node
            node = held.node
            count = min(per - offset, most - held.done)
            held.done += count
            if offset and held.pieces:
                run, low, _ = held.pieces[-1]
                if run.refs == 1 and run.high == offset and node.runs[-1] is run:
                    run.high += count
                    run.rest = None
                    held.pieces[-1] = _Piece(run, low, offset + count)
                    continue
            run = Run(node, offset, offset + count, 1)
            node.runs.append(run)
            held.pieces.append(_Piece(run, offset, offset + count))

    def release(self, job: Job, blocks: int, known: int, left: bool) -> int:
        """A job gives up its blocks; how many nobody else holds.

        Args:
            blocks: that it holds.
            known: tokens whose contents are known.
            left: it will not come back.
        """
        held = self._jobs[job.number]
        full = min(known // self.block_size, blocks) - held.done
        own = blocks - held.done
        full = max(0, min(full, own))
        self._blank += own - full
        if left:
            del self._jobs[job.number]
        if full:
            last = self._free.ends.before
            assert last is not None
            if left and last.node is None and last is not self._free.ends and last.rest is self._free.ends:
                last.high += full
            else:
                run = Run(None, 0, full, 0)
                self._free.append(run)
                if left:
                    # Marks blocks that nobody asks for, to which others can be added.
                    run.rest = self._free.ends
                else:
                    held.lost = run
        freed = own
        for run, _, high in reversed(held.pieces):
            parts: list[Run] = []
            part: Run | None = run
            while part is not None and part.low < high:
                parts.append(part)
                part = part.rest
            for part in reversed(parts):
                part.refs -= 1
                if not part.refs:
                    freed += part.high - part.low
                    self._free.append(part)
        held.pieces.clear()
        held.done, held.node = 0, self._root
        return freed

    def forget(self, job: Job) -> None:
        """A job that holds nothing will not come back."""
        self._jobs.pop(job.number, None)
