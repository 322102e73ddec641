"""The way of a request through prefill and decode, and what goes straight to decode."""

from __future__ import annotations

import json

import pytest
from scripted import LONG, REFERENCE, body


async def test_prefill_then_decode(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    status, answer = await router.post(
        body(stream=False, temperature=0, n=1, min_tokens=3), headers={"X-Request-Id": "abc-1"}
    )
    assert status == 200
    assert answer["choices"][0]["text"] == d.instance_id
    [to_p], [to_d] = p.seen, d.seen
    assert to_p.body["max_tokens"] == 1
    assert to_p.body["stream"] is False
    assert "min_tokens" not in to_p.body
    assert to_p.body["kv_transfer_params"]["do_remote_decode"] is True
    assert to_d.body == {**body(stream=False, temperature=0, n=1, min_tokens=3), "kv_transfer_params": REFERENCE}
    assert to_p.headers["X-Request-Id"] == to_d.headers["X-Request-Id"] == "abc-1"
    assert router.value("decisions_total", path="disaggregated", reason="prefill") == 1


async def test_stream_passes_through_unchanged(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    status, raw = await router.post(body(stream=True, stream_options={"include_usage": True}))
    assert status == 200
    assert raw.count(b"data: ") == 5
    assert raw.endswith(b"data: [DONE]\n\n")
    assert "stream_options" not in p.seen[0].body
    assert d.seen[0].body["stream_options"] == {"include_usage": True}


async def test_reference_passes_verbatim(instance, serve):
    """The reference is spliced in as bytes: a float such as 0.10 or a big number may not change."""
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    text = b'{ "prompt": ' + json.dumps(LONG).encode() + b', "model":"tiny", "temperature": 0.10 } \n'
    status, _ = await router.post(text)
    assert status == 200
    assert d.seen[0].raw.startswith(text.rstrip()[:-1].rstrip())
    assert d.seen[0].body["kv_transfer_params"] == REFERENCE


@pytest.mark.parametrize(
    ("over", "reason"),
    [
        ({"prompt": [1, 2, 3]}, "short"),
        ({"prompt": [LONG, LONG]}, "batch"),
        ({"prompt": "a" * 10}, "short"),
        ({"n": 2}, "several_sequences"),
        ({"best_of": 3}, "several_sequences"),
        ({"use_beam_search": True}, "beam_search"),
        ({"prompt_logprobs": 0}, "prompt_output"),
        ({"echo": True}, "prompt_output"),
        ({"prompt_embeds": "x"}, "prompt_embeds"),
        ({"max_tokens": "many"}, "output_limit"),
        ({"max_tokens": 0}, "output_limit"),
        ({"prompt": 7}, "malformed"),
        ({"prompt": None}, "malformed"),
    ],
)
async def test_what_goes_straight_to_decode(instance, serve, over, reason):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    status, _ = await router.post(body(**over))
    assert status == 200
    assert not p.seen
    assert d.seen[0].body == body(**over)
    assert router.value("decisions_total", path="direct", reason=reason) == 1


async def test_single_entry_batch_and_chat_are_disaggregated(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    await router.post(body(prompt=[LONG]))
    chat = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "word " * 50}],
        "max_completion_tokens": 9,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
    }
    status, raw = await router.post(chat, path="/v1/chat/completions")
    assert status == 200
    assert raw.endswith(b"[DONE]\n\n")
    assert [seen.path for seen in p.seen] == ["/v1/completions", "/v1/chat/completions"]
    assert p.seen[1].body["max_tokens"] == p.seen[1].body["max_completion_tokens"] == 1
    assert "top_logprobs" not in p.seen[1].body
    assert d.seen[1].body["max_completion_tokens"] == 9
    assert router.value("decisions_total", path="disaggregated", reason="prefill") == 2


async def test_nothing_is_thought_cached_where_decode_keeps_no_prefixes(instance, serve):
    p, d = await instance("prefill"), await instance("decode", says={"prefix_caching": False})
    router = await serve([p, d])
    await router.post(body())
    await router.post(body())
    assert len(p.seen) == 2
    assert router.value("history_chunks", instance=d.instance_id) == 0


async def test_cached_prompt_goes_straight_to_decode(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    await router.post(body())
    await router.post(body(prompt=[*LONG, 7, 7, 7]))
    assert len(p.seen) == 1
    assert router.value("decisions_total", path="direct", reason="cached") == 1
    # Another salt shares no block with it.
    await router.post(body(cache_salt="other"))
    assert len(p.seen) == 2
    # A restart of decode empties what is remembered of it.
    d.epoch = "e2"
    await router.until(lambda: any(m.epoch == "e2" for m in router.router.pool.members))
    await router.post(body())
    assert len(p.seen) == 3


async def test_text_length_is_learned_from_prefill(instance, serve):
    p, d = await instance("prefill", prompt_tokens=100), await instance("decode")
    router = await serve([p, d])
    for index in range(60):
        await router.post(body(prompt=f"{index} " + "x" * 198))
    assert router.value("bytes_per_token") == pytest.approx(2.0, rel=0.15)


async def test_any_instances_are_balanced_not_disaggregated(instance, serve):
    one, two = await instance(), await instance()
    router = await serve([one, two])
    for _ in range(6):
        await router.post(body())
    assert (len(one.seen), len(two.seen)) == (3, 3)
    assert router.value("decisions_total", path="direct", reason="no_prefill") == 6


async def test_any_prefills_for_a_dedicated_decode(instance, serve):
    helper, d = await instance("any"), await instance("decode")
    router = await serve([helper, d], policies={"decode": "round_robin"})
    for _ in range(4):
        status, _ = await router.post(body(prompt=[len(helper.seen) + len(d.seen), *LONG]))
        assert status == 200
    assert any(seen.body.get("kv_transfer_params", {}).get("do_remote_decode") for seen in helper.seen)
    assert not any((seen.body.get("kv_transfer_params") or {}).get("do_remote_decode") for seen in d.seen)


async def test_versions_are_kept_apart_while_they_are_mixed(instance, serve):
    """An upgrade: each decode gets its prompts from prefill of its own version; one that has none does them itself."""
    old = {"vllm": "0.32.0", "kv": "a"}
    new = {"vllm": "0.33.0", "kv": "a"}
    p_old, d_old = await instance("prefill", says=old), await instance("decode", says=old)
    p_new, d_new = await instance("prefill", says=new), await instance("decode", says=new)
    router = await serve([p_old, d_old, p_new, d_new], policies={"decode": "round_robin"})
    for number in range(8):
        status, _ = await router.post(body(prompt=[number, *LONG]))
        assert status == 200
    for mine, theirs in ((p_old, d_old), (p_new, d_new)):
        assert len(mine.seen) == len(theirs.seen) == 4
        assert [one.body["prompt"] for one in mine.seen] == [one.body["prompt"] for one in theirs.seen]
    # Another layout is as bad, and a prefill that says nothing of itself is taken.
    p_old.says = {"vllm": "0.32.0", "kv": "b"}
    await router.until(lambda: any(m.state.versions.get("kv") == "b" for m in router.router.pool.members))
    for number in range(2):
        await router.post(body(prompt=[100 + number, *LONG]))
    assert router.value("decisions_total", path="direct", reason="other_version") == 1
    p_old.says = {"vllm": None, "kv": None}
    await router.until(lambda: any(m.state.versions.get("kv") is None for m in router.router.pool.members))
    before = len(p_old.seen)
    for number in range(4):
        await router.post(body(prompt=[200 + number, *LONG]))
    assert len(p_old.seen) > before
