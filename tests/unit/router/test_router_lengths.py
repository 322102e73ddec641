"""Outstanding tokens counted with the output that was learned from earlier answers."""

from __future__ import annotations

import asyncio
import json
import random
from types import SimpleNamespace

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_suite.router.lengths import OutputLengths, measure
from vllm_suite.router.prompt import read_prompt
from vllm_suite.router.relay import Opened

LEARN = {"lengths": {"learn": True, "estimator": {"shrinkage": 0, "half_life_observations": None}}}
PROMPT = list(range(7))


def body(label=None, **over):
    named = {"vllm_xargs": {"dler_class": label}} if label else {}
    return {"model": "tiny", "prompt": PROMPT, **named, **over}


def outstanding(served, one) -> int:
    [member] = [m for m in served.router.pool.members if m.instance_id == one.instance_id]
    return member.outstanding_tokens


async def charged(served, one, request) -> int:
    """What is counted for a request while it runs."""
    one.hold = asyncio.Event()
    task = asyncio.create_task(served.post(request))
    await served.until(lambda: outstanding(served, one) > 0)
    found = outstanding(served, one)
    one.hold.set()
    one.hold = None
    status, _ = await task
    assert status == 200
    await served.until(lambda: outstanding(served, one) == 0)
    return found


async def test_without_learning_a_request_counts_with_what_it_allows(instance, serve):
    one = await instance()
    served = await serve([one])
    for _ in range(3):
        await served.post(body(max_tokens=5))
    assert await charged(served, one, body(max_tokens=900)) == 7 + 900
    assert await charged(served, one, body()) == 7 + 256
    assert served.value("lengths_total", kind="censored") == 0


async def test_what_was_learned_of_a_class_counts(instance, serve):
    one = await instance(finish_reason="stop")
    served = await serve([one], **LEARN)
    assert await charged(served, one, body("chat")) == 7 + 256  # nothing is known yet
    one.completion_tokens = 600
    for _ in range(3):
        await served.post(body("code"))
    one.completion_tokens = 30
    for _ in range(40):
        await served.post(body("chat"))
    assert served.value("lengths_total", kind="exact") == 44
    one.completion_tokens = 600
    assert await charged(served, one, body("code")) == 7 + 600
    assert await charged(served, one, body("code", max_tokens=100)) == 7 + 100
    one.completion_tokens = 30
    assert await charged(served, one, body("chat", max_tokens=4000)) in range(7 + 27, 7 + 31)
    assert await charged(served, one, body()) < 7 + 100


async def test_the_lengths_of_streams_are_learned(instance, serve):
    one = await instance(finish_reason="stop", events=200)
    served = await serve([one], **LEARN)
    for _ in range(2):
        status, raw = await served.post(body("chat", stream=True))
        assert status == 200
        assert raw.count(b"data: ") == 201
    assert served.value("lengths_total", kind="exact") == 2
    assert await charged(served, one, body("chat")) == pytest.approx(7 + 200, rel=0.05)


async def test_the_usage_of_a_stream_is_believed(instance, serve):
    one = await instance(finish_reason="stop", events=50, completion_tokens=400, usage_event=True)
    served = await serve([one], **LEARN)
    await served.post(body("chat", stream=True, stream_options={"include_usage": True}))
    assert served.value("lengths_total", kind="exact") == 1
    assert await charged(served, one, body("chat")) == 7 + 400


async def test_answers_that_were_cut_off_are_censored(instance, serve):
    one = await instance(finish_reason="length", events=300)
    served = await serve([one], **LEARN)
    one.completion_tokens = 20
    await served.post(body("chat", max_tokens=20))  # reached its limit
    one.script.append("trickle")
    async with served.client.post(served.url + "/v1/completions", json=body("chat", stream=True)) as response:
        await response.content.readany()  # the client leaves
    one.script.append("die")
    await served.post(body("chat", stream=True))  # the instance broke off
    async with aiohttp.ClientSession() as served.client:  # without the connection that broke off
        await censored_are_expected_to_be_longer(served, one)


async def censored_are_expected_to_be_longer(served, one):
    await served.until(lambda: served.value("lengths_total", kind="censored") == 3)
    assert served.value("lengths_total", kind="exact") == 0
    assert served.value("lengths_total", kind="unknown") == 0
    # None ended by itself, so they are longer than what was seen of them.
    one.completion_tokens = 5
    assert await charged(served, one, body("chat")) > 7 + 5


async def test_answers_of_several_sequences_and_errors_are_not_learned(instance, serve):
    one = await instance(finish_reason="stop", completion_tokens=500)
    served = await serve([one], **LEARN)
    one.script.append("400")
    assert (await served.post(body("chat")))[0] == 400
    assert (await served.post(body("chat", n=2)))[0] == 200
    assert (await served.post(body("chat", prompt=[PROMPT, PROMPT])))[0] == 200
    one.finish_reason = "error"
    await served.post(body("chat"))
    assert [served.value("lengths_total", kind=kind) for kind in ("exact", "censored", "unknown")] == [0, 0, 1]
    assert await charged(served, one, body("chat")) == 7 + 256


async def test_what_was_learned_outlives_the_router(instance, serve, tmp_path):
    path = tmp_path / "lengths.json"
    one = await instance(finish_reason="stop", completion_tokens=77)
    settings = {"lengths": {**LEARN["lengths"], "state_file": str(path)}}
    served = await serve([one], **settings)
    assert served.value("length_state_total", step="load", outcome="missing") == 1
    await served.post(body("chat"))
    app_metrics = served.router.metrics
    await served.runner.cleanup()
    assert app_metrics.registry.get_sample_value(
        "vllm_suite_router_length_state_total", {"step": "save", "outcome": "ok"}
    )
    again = await serve([one], **settings)
    assert again.value("length_state_total", step="load", outcome="ok") == 1
    assert await charged(again, one, body("chat")) == 7 + 77


async def test_a_torn_state_file_does_not_stop_the_router(instance, serve, tmp_path):
    path = tmp_path / "lengths.json"
    path.write_text('{"format": "vllm-suite-lengths", "ver')
    one = await instance()
    served = await serve([one], lengths={**LEARN["lengths"], "state_file": str(path)})
    assert served.value("length_state_total", step="load", outcome="failed") == 1
    assert (await served.post(body("chat")))[0] == 200


# What an answer says of its length


def chunk(text: str, reason: str | None = None, **over) -> bytes:
    """An event as vLLM 0.32 writes it."""
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": reason, "token_ids": None}
    event = {"id": "chatcmpl-8d1f9cf1b5f0a1a0", "object": "chat.completion.chunk", "created": 1763730000}
    event |= {"model": "tiny", "choices": [choice], **over}
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def opened(pieces: list[bytes], ended: bool = True) -> Opened:
    content = SimpleNamespace(total_bytes=sum(map(len, pieces)))
    answer = Opened(SimpleNamespace(status=200, content=content), pieces[0], False)
    answer.tail = b"".join(pieces[-3:])
    answer.ended = ended
    return answer


def cut(raw: bytes, rng: random.Random, mean: int) -> list[bytes]:
    pieces = []
    while raw:
        size = max(1, int(rng.expovariate(1 / mean)))
        pieces.append(raw[:size])
        raw = raw[size:]
    return pieces


def stream(tokens: int, rng: random.Random, reason: str = "stop") -> list[bytes]:
    words = [
        rng.choice(["a", " the", ",", " length", " distribution", "\n\n", ' "finish_reason":"length"'])
        for _ in range(tokens)
    ]
    return [*(chunk(word) for word in words[:-1]), chunk(words[-1], reason), b"data: [DONE]\n\n"]


@given(st.integers(50, 400), st.integers(0, 1000), st.sampled_from([None, 300, 3000, 60_000]))
def test_the_tokens_of_a_stream_follow_from_its_bytes(tokens, seed, mean):
    rng = random.Random(seed)
    events = stream(tokens, rng)
    pieces = events if mean is None else cut(b"".join(events), rng, mean)
    found, reason = measure(opened(pieces))
    if mean is None or len(pieces) == 1:
        assert reason == "stop"
    if len(pieces[0]) > 300:
        assert found
    # Nothing is said where no piece held a whole event.
    if found:
        assert found == pytest.approx(tokens, rel=0.12, abs=2)


def test_usage_at_the_end_of_a_stream_is_exact():
    events = stream(100, random.Random(1))
    usage = {"prompt_tokens": 7, "total_tokens": 107, "completion_tokens": 100}
    events.insert(-1, b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
    assert measure(opened(events)) == (100, "stop")


def test_the_usage_of_a_whole_answer_may_lie_far_from_its_end():
    usage = {"prompt_tokens": 9000, "completion_tokens": 321}
    choice = {"index": 0, "text": '"finish_reason":"length","completion_tokens":7', "finish_reason": "stop"}
    document = {"choices": [choice], "usage": usage, "prompt_token_ids": list(range(9000))}
    answer = Opened(SimpleNamespace(status=200), json.dumps(document).encode(), True)
    answer.ended = True
    assert measure(answer) == (321, "stop")


def test_a_stream_that_was_cut_off_has_no_reason():
    events = stream(100, random.Random(1))
    tokens, reason = measure(opened(events[:60], ended=False))
    assert reason == ""
    assert tokens == pytest.approx(60, rel=0.1)


def test_a_request_is_known_by_what_it_names():
    model = OutputLengths(SimpleNamespace(class_field="kind", estimator=None, state_file=None), None)

    def keys(**over):
        return model.keys(read_prompt("chat", json.dumps({"model": "m", "messages": [], **over}).encode()))

    assert keys(vllm_xargs={"kind": "a"}, user="u")[:2] == ("class:m:a", "user:m:u")
    assert keys()[-1] == "model:m"
    plain = keys()[0]
    assert keys(tools=[{"type": "function"}])[0] != plain
    assert keys(reasoning_effort="high")[0] != plain
    assert keys(chat_template_kwargs={"enable_thinking": False})[0] != plain
    assert keys(response_format={"type": "json_object"})[0] != plain
    assert keys(n=2) == ()
    assert model.keys(read_prompt("chat", b"{")) == ()
    for odd in ({"vllm_xargs": 3}, {"vllm_xargs": {"kind": 3}}, {"user": 3}, {"chat_template_kwargs": 3}):
        assert keys(**odd)[-1] == "model:m"
