"""Output lengths that the router learns from the answers it relays, for counting outstanding tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from math import ceil
from typing import Any

from vllm_suite.lengths import OnlineLengths
from vllm_suite.router.config import OutputLengths as Settings
from vllm_suite.router.metrics import RouterMetrics
from vllm_suite.router.prompt import Prompt
from vllm_suite.router.relay import Opened

logger = logging.getLogger(__name__)

# Longer than any answer: the cap of a request that sets none, where the instance does not say how long it may be.
_NO_LIMIT = 1 << 20
# Requests whose answer is several sequences, or no answer that the router understands.
SEVERAL = frozenset({"several_sequences", "batch", "beam_search"})
_UNCOUNTED = SEVERAL | {"malformed", "unparsed", "output_limit"}
# Reasons for which an answer ends by itself, and those that cut it off; any other says nothing of its length.
_EXACT = frozenset({"stop", "tool_calls", "function_call"})
_CENSORED = frozenset({"length", "abort", "repetition"})
_FINISH = b'"finish_reason":'
_USAGE = b'"completion_tokens":'
_EVENT_END = b"\n\n"
# Of a stream's beginning and end, for the size of its events.
_SAMPLE_BYTES = 4096


class OutputLengths:
    """One per router, on its event loop."""

    def __init__(self, settings: Settings, metrics: RouterMetrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self.model = OnlineLengths(settings.estimator)

    def load(self) -> None:
        """Take over what an earlier run has saved; without it the router learns anew."""
        path = self._settings.state_file
        if path is not None:
            found = self.model.load(path)
            self._metrics.count("length_state", "load", found.outcome)
            if found.outcome == "failed":
                logger.warning("output lengths are learned anew: %s", found.reason)

    def save(self) -> None:
        """Keep what was learned for the next run."""
        path = self._settings.state_file
        if path is not None:
            found = self.model.save(path)
            self._metrics.count("length_state", "save", found.outcome)
            if found.outcome != "ok":
                logger.warning("output lengths are not kept: %s", found.reason)

    def keys(self, prompt: Prompt) -> tuple[str, ...]:
        """Class and user that the request names, then what it asks for; none for what is not learned from."""
        document = prompt.document
        if document is None or prompt.whole_reason in _UNCOUNTED:
            return ()
        get = document.get
        found = []
        named = get("vllm_xargs")
        label = named.get(self._settings.class_field) if isinstance(named, dict) else None
        if isinstance(label, str):
            found.append(f"class:{prompt.model}:{label}")
        user = get("user")
        if isinstance(user, str):
            found.append(f"user:{prompt.model}:{user}")
        size = len(prompt.token_ids) if prompt.token_ids is not None else len(prompt.text) // 4
        found.append(f"kind:{prompt.model}:{_kind(document)}:{size.bit_length()}")
        found.append(f"model:{prompt.model}")
        return tuple(found)

    def expected(self, prompt: Prompt, keys: tuple[str, ...], room: int | None) -> int:
        """Output tokens to count for a request; `room` is the longest sequence its instance takes.

        What the request allows, as without learning, where nothing is known yet.
        """
        if not keys:
            return prompt.output_tokens
        rest = self.model.remaining(keys, 0, prompt.output_tokens if prompt.limited else room or _NO_LIMIT)
        return prompt.output_tokens if rest is None else ceil(rest)

    def ended(self, keys: tuple[str, ...], answer: Opened) -> None:
        """Learn from an answer that was relayed, whole or not."""
        if not keys or answer.response.status != 200:
            return
        tokens, reason = measure(answer)
        if not tokens or (answer.ended and reason not in _EXACT | _CENSORED):
            self._metrics.count("lengths", "unknown")
            return
        censored = reason not in _EXACT
        self.model.observe(keys, tokens, censored=censored)
        self._metrics.count("lengths", "censored" if censored else "exact")


def measure(answer: Opened) -> tuple[int, str]:
    """What `_measure` finds, once for each answer."""
    if answer.measured is None:
        answer.measured = _measure(answer)
    return answer.measured


def _measure(answer: Opened) -> tuple[int, str]:
    """Output tokens of a relayed answer and why it ended, "" where it was cut off.

    Exact where the end of the answer reports usage. A stream without it has about one token an event; its events
    are not counted one by one, but their number follows from its bytes and the size of the events at both ends.
    """
    tail = answer.first if answer.whole else answer.tail
    reason = _word(tail, _FINISH) if answer.ended else ""
    usage = _word(tail, _USAGE)
    if usage.isdigit():
        return int(usage), reason
    if answer.whole:
        return 0, reason
    # The last part of a piece is empty, or an event that the piece does not hold to its end.
    events = answer.first[:_SAMPLE_BYTES].split(_EVENT_END)[:-1] + tail[-_SAMPLE_BYTES:].split(_EVENT_END)[:-1]
    sizes = [len(event) + len(_EVENT_END) for event in events if event.startswith(b"data: {")]
    if not sizes:
        return 0, reason
    return round(answer.response.content.total_bytes * len(sizes) / sum(sizes)), reason


def _word(text: bytes, name: bytes) -> str:
    """The value after the last `name`: a string without its quotes, digits, or "null"."""
    at = text.rfind(name)
    if at < 0:
        return ""
    value = text[at + len(name) : at + len(name) + 32].lstrip()
    ends = b'"' if value[:1] == b'"' else b",}] \n\r"
    value = value[1:] if value[:1] == b'"' else value
    end = next((index for index, byte in enumerate(value) if byte in ends), len(value))
    return value[:end].decode("ascii", "replace")


def _kind(document: Mapping[str, Any]) -> str:
    """What most changes how long an answer is: whether it reasons, and whether its form is prescribed."""
    template = document.get("chat_template_kwargs")
    thinking = template.get("enable_thinking") if isinstance(template, dict) else None
    effort = document.get("reasoning_effort")
    formed = document.get("response_format") is not None or document.get("structured_outputs") is not None
    return f"{thinking}:{effort if isinstance(effort, str) else None}:{formed}:{bool(document.get('tools'))}"
