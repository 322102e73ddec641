"""An encode and a prefill-decode engine, the ways a test looks at them, and the ways it breaks them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from child import scheduler
from epd_engine import Answer, Ask, EpdEngine, runner

from vllm_suite.encoded import Pending, Where
from vllm_suite.fleet.pictures_parts import Part, image_part, text_part

# Short deadlines and small pools, so that a test of either takes a moment.
SUITE = {
    "connect_timeout_s": 0.5,
    "claim_timeout_s": 1.0,
    "read_timeout_s": 1.5,
    "hold_s": 2.0,
    "fetch_timeout_s": 3.0,
    "pending_timeout_s": 30.0,
    "peer_retry_s": 0.5,
    "peer_retry_max_s": 1.0,
    "lease_s": 20.0,
    "block_bytes": 4096,
    "pool_bytes": 1 << 20,
    "receive_bytes": 256 << 10,
}
SIZE = 112  # pixels; 16 rows
METADATA = [1, 8, 8]
_numbers = itertools.count()


def new_uuid() -> str:
    """Never seen by any cache."""
    return f"s-{next(_numbers)}"


def picture(uuid: str, seed: int, size: int = SIZE) -> Part:
    return image_part(size, size, seed, uuid=uuid)


def named(uuid: str, grid: list[Any] | None = None) -> Part:
    """The item without its pixels."""
    return {"type": "image_embeds", "image_embeds": {"image_grid_thw": grid or METADATA}, "uuid": uuid}


def question(item: Part) -> list[Part]:
    return [text_part("Here it is, look: "), item, text_part("What is it?")]


class Stage:
    """E and PD. Every request of a test runs in a batch with others, which must come out as alone."""

    def __init__(self, e: EpdEngine, pd: EpdEngine) -> None:
        self.e, self.pd = e, pd
        self._alone: dict[int, Answer] = {}
        self._text = [text_part("Tell me about the weather in the mountains, in a few words.")]
        self._text_alone = pd.ask(self._text)

    def expected(self, seed: int) -> Answer:
        """What a request about picture ``seed`` says on the consumer alone, its own encoder used."""
        if seed not in self._alone:
            self._alone[seed] = self.pd.ask(question(picture(new_uuid(), seed)))
        return self._alone[seed]

    def batch(self, parts: list[Part], ec: dict[str, Any] | None = None, **options: Any) -> Answer:
        """Ask in the middle of a batch; the others' answers are checked."""
        return self.check(*self.pd.ask_many(self.asks(parts, ec, **options)))

    def asks(self, parts: list[Part], ec: dict[str, Any] | None = None, **options: Any) -> list[Ask]:
        other = question(picture(new_uuid(), 1))
        return [Ask(self._text), Ask(parts, ec=ec, **options), Ask(other), Ask(self._text)]

    def check(self, first: Answer, mine: Answer, other: Answer, last: Answer) -> Answer:
        assert first.said() == last.said() == self._text_alone.said()
        assert other.said() == self.expected(1).said()
        return mine

    def encoded(self, seed: int, uuid: str | None = None) -> tuple[str, dict[str, Any]]:
        """A new item on E, and what E says of it."""
        uuid = uuid or new_uuid()
        return uuid, self.e.encode([picture(uuid, seed)])

    def where(self) -> Where:
        """The encoder as a router knows it."""
        uuid, ec = self.encoded(7)
        ref = ec[uuid]["suite"]
        return Where(ref["producer"], ref["epoch"], ref["claim_host"], ref["claim_port"])

    def counter(self, name: str, **labels: str) -> float:
        return self.pd.metric(f"vllm_suite_ec_{name}_total", **labels)

    def refused(self, fault: Callable[[str, dict[str, Any]], dict[str, Any]], reason: str, seed: int = 3) -> None:
        """What ``fault`` made of an item is refused for ``reason``: encoded here with its pixels, failed without."""
        expected = self.expected(seed)
        for pixels in (True, False):
            uuid, ec = self.encoded(seed)
            ec = fault(uuid, ec)
            before = self.totals(reason)
            answer = self.batch(question(picture(uuid, seed) if pixels else named(uuid)), ec)
            change = {name: value - before[name] for name, value in self.totals(reason).items()}
            if pixels:
                assert answer.said() == expected.said()
            else:
                assert answer.finish_reason == "error"
            assert change == {"refused": 1, "local_encodes": int(pixels), "failed_items": int(not pixels), "loads": 0}
        self.healthy()

    def healthy(self, seed: int = 4) -> None:
        """The next item is fetched and used."""
        uuid, ec = self.encoded(seed)
        before = self.counter("loads")
        assert self.batch(question(named(uuid)), ec).said() == self.expected(seed).said()
        assert self.counter("loads") == before + 1

    def totals(self, reason: str) -> dict[str, float]:
        by_reason = {name: self.counter(name, reason=reason) for name in ("refused", "local_encodes", "failed_items")}
        return by_reason | {"loads": self.counter("loads")}


def pending(uuid: str, *places: Where, wait_s: float = 20.0) -> dict[str, Any]:
    """What a router tells of an item that is being encoded."""
    import msgspec

    return {uuid: {"suite_pending": msgspec.to_builtins(Pending(identifier=uuid, candidates=places, wait_s=wait_s))}}


# --- in the child ---


def _worker() -> Any:
    from vllm.distributed.ec_transfer import get_ec_transfer

    return get_ec_transfer().worker


def _stored(uuid: str) -> Any:
    item = _worker()._pool._shelves.find(uuid)
    assert item is not None
    return item


def lie(_llm: Any, uuid: str, changes: dict[str, Any]) -> None:
    """The producer says something else of an item than what it has."""
    item = _stored(uuid)
    item.stored = replace(item.stored, **changes)


def shorten(_llm: Any, uuid: str) -> None:
    """Half of the item's bytes are gone, and the producer knows."""
    item = _stored(uuid)
    offset, size = item.stored.runs[0]
    item.stored = replace(item.stored, runs=((offset, size // 2),), size=size // 2)


def flip(_llm: Any, uuid: str) -> None:
    """One bit of the producer's memory changes after publication."""
    item = _stored(uuid)
    offset, size = item.stored.runs[0]
    item.tier.slab[offset + size // 2] ^= 1


def exchange(_llm: Any, uuid: str, other: str) -> None:
    """The bytes of another item of the same shape lie where the item's should."""
    mine, its = _stored(uuid), _stored(other)
    (to, size), (origin, _) = mine.stored.runs[0], its.stored.runs[0]
    mine.tier.slab[to : to + size] = its.tier.slab[origin : origin + size]


def poison(_llm: Any, uuid: str, value: float) -> None:
    """A producer that checks nothing has published NaN or infinity."""
    import torch

    from vllm_epd.checksum import checksum

    item = _stored(uuid)
    offset, size = item.stored.runs[0]
    data = item.tier.slab[offset : offset + size]
    data.view(torch.float32)[5] = value
    item.stored = replace(item.stored, checksum=checksum(data, item.stored.seed))


def encode_to(llm: Any, value: float) -> None:
    """The encoder's outputs hold ``value`` from now on; 0 restores it."""
    import torch

    model = runner(llm).model
    true = getattr(model, "_true_embed", None) or model.embed_multimodal
    model._true_embed = true

    def embed(**kwargs: Any) -> Any:
        return [torch.full_like(rows, value) for rows in true(**kwargs)]

    model.embed_multimodal = embed if value else true


def waiting_claims(_llm: Any) -> int:
    return int(_worker()._server.waiting)


def strike(_llm: Any, pid: int, sig: int) -> None:
    """The next read's producer gets a signal between its grant and the read."""
    agent = _worker()._agent
    read = type(agent).read

    def struck(*args: Any, **kwargs: Any) -> Any:
        os.kill(pid, sig)
        del agent.read
        return read(agent, *args, **kwargs)

    agent.read = struck


def set_key(llm: Any, key: bytes | None) -> None:
    """The fleet's key as this engine's consumer side knows it."""
    scheduler(llm).ec_connector.scheduler._view.key = key


def set_on_failure(llm: Any, value: str) -> None:
    consumer = scheduler(llm).ec_connector.scheduler.consumer
    consumer.config = consumer.config.model_copy(update={"on_failure": value})


@dataclass
class Steps:
    """What was computed of each request, in the order of their arrival: tokens of each step, and where items begin."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    items: dict[str, list[int]] = field(default_factory=dict)

    def boundaries(self, prompt_tokens: int) -> list[int]:
        """Where the chunks of the only request's prompt end."""
        ((_, tokens),) = self.tokens.items()
        ends = list(itertools.accumulate(tokens))
        return [end for end in ends if end <= prompt_tokens]


def record_steps(llm: Any) -> None:
    """Keep what each step computes, for `steps`."""
    core = scheduler(llm)
    schedule = type(core).schedule
    core._test_steps = Steps()

    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = schedule(core, *args, **kwargs)
        for request_id, tokens in output.num_scheduled_tokens.items():
            core._test_steps.tokens.setdefault(request_id, []).append(tokens)
            offsets = [feature.mm_position.offset for feature in core.requests[request_id].mm_features]
            core._test_steps.items[request_id] = offsets
        return output

    core.schedule = recorded


def steps(llm: Any) -> Steps:
    core = scheduler(llm)
    del core.schedule
    recorded: Steps = core._test_steps
    return recorded


def abort_pending(llm: Any, parts: list[Part], ec: dict[str, Any]) -> dict[str, Any]:
    """Start a request whose item is under way, then abort it; what the consumer says of it before and after."""
    from vllm import SamplingParams

    engine, half = llm.llm_engine, scheduler(llm).ec_connector.scheduler
    params = SamplingParams(max_tokens=4, extra_args={"ec_transfer_params": ec})
    prompt = llm._preprocess_chat([[{"role": "user", "content": parts}]])[0]
    engine.add_request("1000000", prompt, params)
    for _ in range(20):
        engine.step()
    said = {
        "attempts": len(half.consumer._ledger),
        "held": half.held_requests(),
        "wait": half.idle_wait_s(False),
        "wait beside others": half.idle_wait_s(True),
    }
    engine.abort_request(["1000000"])
    for _ in range(5):
        engine.step()
    return said | {"attempts after": len(half.consumer._ledger), "wait after": half.idle_wait_s(False)}


def abort_at_once(llm: Any, parts: list[Part]) -> None:
    """A request that is aborted before its first step."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    prompt = llm._preprocess_chat([[{"role": "user", "content": parts}]])[0]
    engine.add_request("1000001", prompt, SamplingParams(max_tokens=1))
    engine.abort_request(["1000001"])


def lose_next_load(_llm: Any) -> None:
    """The next item that is to be loaded is gone."""
    puller = _worker()._puller
    take = type(puller).take

    def lost(ticket: int) -> None:
        take(puller, ticket)
        del puller.take

    puller.take = lost


def reset_encoder_cache(llm: Any) -> None:
    """What vLLM does when weights have changed."""
    llm.llm_engine.engine_core.engine_core.reset_encoder_cache()


def open_state(llm: Any) -> dict[str, int]:
    """What the consumer still keeps of requests; all of it is 0 once none is left."""
    half, puller = scheduler(llm).ec_connector.scheduler.consumer, _worker()._puller
    return {
        "attempts": len(half._ledger),
        "wants": len(half._ledger._wants) + len(half._ledger._refused),
        "failed": len(half._failed) + len(half._unavailable),
        "users": len(half._using),
        "tasks": len(puller._tasks),
        "ready": len(puller._ready),
        "blocks": puller.room.used_blocks,
    }
