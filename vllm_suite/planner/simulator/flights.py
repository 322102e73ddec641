"""A request on its way through a fleet: where it is, what it is given to engines as, and the times that it leaves."""

from __future__ import annotations

from vllm_suite.planner.simulator.encoders import Waiter
from vllm_suite.planner.simulator.handover import Lease
from vllm_suite.planner.simulator.instances import Leg
from vllm_suite.planner.simulator.jobs import Job
from vllm_suite.planner.simulator.routing import Instance
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.simulator.setting import Setting
from vllm_suite.planner.workload import Item, Request


class Flight:
    """A request on its way.

    Attributes:
        decode: the instance that the router has picked for the answer, before any other stage.
        prefill, lease: where its cache lies, and what keeps it there.
        waiter: its items at the encode stage, until they were fetched.
        ahead: prefill does not wait for all of them.
        since: when it came to the queue that it is in.
    """

    __slots__ = ("ahead", "decode", "lease", "prefill", "request", "served", "since", "waiter")

    def __init__(self, request: Request, decode: Instance) -> None:
        self.request, self.decode = request, decode
        self.served = Served(request.number, request.arrival, request.prompt, request.output, request.label)
        self.prefill: Instance | None = None
        self.lease: Lease | None = None
        self.waiter: Waiter | None = None
        self.since, self.ahead = 0.0, False

    def leg(self, output: int, items: tuple[Item, ...]) -> Leg:
        """What an engine gets: the prompt, `output` tokens to make, and items that it encodes itself."""
        each = self.request
        return Leg(
            each.number,
            each.arrival,
            each.prompt,
            output,
            prefix=each.prefix,
            block=each.block,
            label=each.label,
            flight=self,
            items=items,
        )

    def answer_leg(self, own_items: tuple[Item, ...], streams: str) -> Leg:
        """What decode gets: a reference to the cache, or the prompt with the items that it encodes itself."""
        if self.lease is None:
            return self.leg(self.request.output, own_items)
        leg = self.leg(self.request.output, ())
        leg.remote = True
        if streams == "decode":
            # Decode computes the last token of the prompt again and samples from it.
            leg.cached = self.request.prompt - 1
        else:
            leg.cached, leg.generated = self.request.prompt, 1
            leg.first_token = leg.last_token = self.served.prefilled
        return leg

    def note_prefilled(self, instance: Instance, job: Job, now: float) -> None:
        """Prefill has computed the prompt."""
        served = self.served
        served.prefill_start, served.prefilled, served.cached = job.first_scheduled, now, job.found
        served.preemptions += job.preemptions
        instance.waited += job.first_scheduled - self.since

    def note_answered(self, instance: Instance, job: Job) -> None:
        """The last token is there."""
        served, start = self.served, job.first_scheduled
        if self.lease is None:
            served.prefill_start, served.prefilled, served.cached = start, job.first_token, job.found
            instance.waited += start - self.since
        else:
            served.decode_start = start
            pulled = served.transferred - served.transfer_start
            instance.waited += start - self.since - (pulled if pulled == pulled else 0.0)
        served.first_token, served.last_token = job.first_token, job.last_token
        served.longest_gap = job.longest_gap
        served.preemptions += job.preemptions


def whole(request: Request, decode: Instance, setting: Setting) -> bool:
    """Whether decode does the prompt itself (vllm_suite/router/decide.py): it is short, or mostly there already."""
    serving, prompt = setting.serving, request.prompt
    if prompt < serving.min_prompt_tokens:
        return True
    if not request.prefix or decode.history is None or not setting.prefix_caching:
        return False
    known = min(decode.history.matched(request.prefix), prompt)
    return known > serving.max_cached_fraction * prompt or prompt - known < serving.min_prompt_tokens
