"""Step times of engines in a fleet: with the encoder's in them, and last prompt tokens at the cost of decode."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from vllm_suite.planner.simulator.jobs import Job
from vllm_suite.planner.sources.base import FloatArray, LatencySource
from vllm_suite.planner.sources.steps import DecodeLine, Steps
from vllm_suite.planner.workload import Item, positions


class Around(LatencySource):
    """A source that answers as another one."""

    def __init__(self, source: LatencySource) -> None:
        self.inner = source
        self.name, self.stages = source.name, source.stages
        self.uncertainty, self.outside = source.uncertainty, source.outside
        # Asked for every run of steps, so without a call in between.
        self.decode_line, self.host_seconds = source.decode_line, source.host_seconds  # type: ignore[method-assign]

    def step_seconds(self, steps: Steps) -> float:
        """See `LatencySource`."""
        return self.inner.step_seconds(steps)

    def seconds(self, steps: Steps) -> FloatArray:
        """See `LatencySource`."""
        return self.inner.seconds(steps)

    def decode_line(self, sequences: int, context: float, longest: float = 0, shortest: float = 0) -> DecodeLine:
        """See `LatencySource`."""
        return self.inner.decode_line(sequences, context, longest, shortest)

    def stage_seconds(self, steps: Steps) -> float:
        """See `LatencySource`."""
        return self.inner.stage_seconds(steps)

    def host_seconds(self, sequences: int) -> float:
        """See `LatencySource`."""
        return self.inner.host_seconds(sequences)


class LastTokens(Around):
    """On a decode instance the last token of a prompt is one query over a cache that is there: vLLM's attention takes
    it for a decode step, so it costs what one does. A step with longer chunks is left as it is.
    """

    def step_seconds(self, steps: Steps) -> float:
        """See `LatencySource`."""
        return self.inner.step_seconds(_decoded(steps))

    def stage_seconds(self, steps: Steps) -> float:
        """See `LatencySource`."""
        return self.inner.stage_seconds(_decoded(steps))


def _decoded(steps: Steps) -> Steps:
    _, chunks, before, _, sequences, context, longest, shortest = steps
    if not chunks or steps.prefill_tokens != chunks or not before:
        return steps
    mean = before / chunks + 1
    if sequences:
        longest, shortest = max(longest, mean), min(shortest, mean)
    else:
        longest = shortest = mean
    return Steps(0, 0, 0, 0, sequences + chunks, context + before + chunks, longest, shortest)


class OwnEncoder(Around):
    """Step times with the encoder's in them: vLLM encodes an item in the step that takes up its first token.

    What was encoded stays in vLLM's encoder
    cache, least recently used first out, up to `keep` tokens.

    Attributes:
        encoded: items.
        extra: seconds of the items of the step with prompts that is being planned.
    """

    def __init__(self, source: LatencySource, seconds: Callable[[Item], float], keep: int) -> None:
        super().__init__(source)
        self.item_seconds, self.keep = seconds, keep
        self.encoded, self.extra = 0, 0.0
        self._kept: OrderedDict[int, int] = OrderedDict()
        self._size = 0

    def chunk(self, job: Job, items: tuple[Item, ...], tokens: int) -> float:
        """Seconds of the items that a chunk of so many tokens of a job begins with or reaches."""
        begin, end, total = job.done, job.done + tokens, 0.0
        first = begin == max(job.cached, job.found)
        for item, at in zip(items, positions(items), strict=True):
            if at >= end:
                break
            if at >= begin or (first and at + item.tokens > begin):
                total += self._item(item)
        return total

    def _item(self, item: Item) -> float:
        kept, content = self._kept, item.content
        if content is not None:
            if content in kept:
                kept.move_to_end(content)
                return 0.0
            kept[content] = item.tokens
            self._size += item.tokens
            while self._size > self.keep and kept:
                self._size -= kept.popitem(last=False)[1]
        self.encoded += 1
        return self.item_seconds(item)

    def step_seconds(self, steps: Steps) -> float:
        """See `LatencySource`; with the items of the step."""
        return self.inner.step_seconds(steps) + self.extra

    def stage_seconds(self, steps: Steps) -> float:
        """See `LatencySource`; the encoder runs on the first stage."""
        return self.inner.stage_seconds(steps) + self.extra
