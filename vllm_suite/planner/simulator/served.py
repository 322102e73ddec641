"""One request that was served, with the time of each of its stages: what a simulated fleet hands to its sink."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_NAN = float("nan")


@dataclass(slots=True)
class Served:
    """A finished request. Times are seconds on the virtual clock, nan where the plan has no such stage.

    Attributes:
        number, arrival, prompt, output, label: of the request; tokens, the items' among them.
        encode_start, encoded: from the first of its items on an encoder to the last output; nan without items, and
            where the instance that prefills encodes too.
        fetched: when the instance that prefills had fetched the encoders' outputs.
        prefill_start: its first step with a part of the prompt.
        prefilled: the end of the step that sampled on the prefill side; in one pool the same as `first_token`.
        transfer_start, transferred: of its keys and values to the decode instance.
        decode_start: its first step on the decode instance.
        first_token, last_token: when the client has them.
        longest_gap: between two tokens of the client; 0 for one token.
        preemptions: how often an engine took its cache away and computed it again.
        cached: prompt tokens that the prefill side did not compute, found in its prefix cache.
        request_s, prompt_s, company_s: seconds to the first token beside all stages, see `setting.Serving`: of any
            request, of its prompt's length, and in company. No stage and no token's time has them in it; `ttft` and
            `latency` do.
    """

    number: int
    arrival: float
    prompt: int
    output: int
    label: str = ""
    encode_start: float = _NAN
    encoded: float = _NAN
    fetched: float = _NAN
    prefill_start: float = _NAN
    prefilled: float = _NAN
    transfer_start: float = _NAN
    transferred: float = _NAN
    decode_start: float = _NAN
    first_token: float = _NAN
    last_token: float = _NAN
    longest_gap: float = 0.0
    preemptions: int = 0
    cached: int = 0
    request_s: float = 0.0
    prompt_s: float = 0.0
    company_s: float = 0.0

    @property
    def beyond(self) -> float:
        """Seconds to the first token beside all stages."""
        return self.request_s + self.prompt_s + self.company_s

    @property
    def ttft(self) -> float:
        """Seconds from arrival to the first token."""
        return self.first_token - self.arrival + self.request_s + self.prompt_s + self.company_s

    @property
    def tpot(self) -> float:
        """Mean gap between tokens in seconds; 0 for one token, as vLLM's benchmark has it."""
        return (self.last_token - self.first_token) / (self.output - 1) if self.output > 1 else 0.0

    @property
    def latency(self) -> float:
        """Seconds from arrival to the last token."""
        return self.last_token - self.arrival + self.beyond

    @property
    def queue_s(self) -> float:
        """Seconds before the first token in which no stage was at work on it: waits for an encoder, for prefill, for
        room on the decode instance, and for its first step there.
        """
        waited, ready = 0.0, self.arrival
        stages = (
            (self.encode_start, self.fetched),
            (self.prefill_start, self.prefilled),
            (self.transfer_start, self.transferred),
            (self.decode_start, self.decode_start),
        )
        for start, end in stages:
            if start == start:
                waited += max(0.0, start - ready)
                ready = max(ready, end)
        return waited


Sink = Callable[[Served], None]
"""Called with each request when its last token is out."""
