"""Bodies: what is parsed, taken out, put in, and what may never pass."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_suite.router.bodies import (
    TRANSFER_FIELDS,
    decode_body,
    prefill_body,
    read_prefill_answer,
    strip_transfer_fields,
)
from vllm_suite.router.prompt import read_prompt

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=20)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)
documents = st.dictionaries(st.text(max_size=12), values, max_size=6)
spaces = st.text(alphabet=" \n\t\r", max_size=3)
references = st.dictionaries(st.text(), values, min_size=1, max_size=4)


@given(documents, references, spaces, spaces)
def test_splice_equals_setting_the_field(document, reference, before, after):
    document.pop("kv_transfer_params", None)
    body = (before + json.dumps(document, indent=1) + after).encode()
    spliced = decode_body(read_prompt("completions", body), json.dumps(reference).encode())
    assert json.loads(spliced) == {**document, "kv_transfer_params": reference}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("spelling", ["kv_transfer_params", "kv_transfer\\u005fparams", "ec_transfer_params"])
@pytest.mark.parametrize("extra", ["", ', "top_p": NaN', ', "seed": 1e999', ', "user": "\\ud800"'])
def test_no_spelling_smuggles_a_reference(encoding, spelling, extra):
    """vLLM reads bodies with Python's json module: any spelling that it understands has to be seen here."""
    inner = '{"do_remote_prefill": true, "remote_host": "10.0.0.1"}'
    text = f'{{"prompt": "x", "{spelling}": {inner}, "{spelling}": {inner}{extra}}}'
    prompt = read_prompt("completions", text.encode(encoding))
    assert strip_transfer_fields(prompt)
    understood = json.loads(prompt.body)
    assert not set(TRANSFER_FIELDS) & set(understood)
    assert understood["prompt"] == "x"


def test_references_inside_xargs_are_taken_out():
    """vLLM uses vllm_xargs as the very dict in which it keeps the transfer fields."""
    body = {"prompt": "x", "vllm_xargs": {"kv_transfer_params": "x", "ec_transfer_params": 1, "mine": 2}}
    prompt = read_prompt("chat", json.dumps(body).encode())
    assert strip_transfer_fields(prompt) == ["vllm_xargs.kv_transfer_params", "vllm_xargs.ec_transfer_params"]
    assert json.loads(prompt.body) == {"prompt": "x", "vllm_xargs": {"mine": 2}}


@given(documents)
def test_a_clean_body_keeps_its_bytes(document):
    document.pop("vllm_xargs", None)
    for name in TRANSFER_FIELDS:
        document.pop(name, None)
    body = json.dumps(document, indent=3).encode()
    prompt = read_prompt("completions", body)
    assert strip_transfer_fields(prompt) == []
    assert prompt.body is body


@given(st.one_of(st.binary(max_size=60), documents.map(lambda document: json.dumps(document).encode())))
def test_any_body_can_be_read(body):
    for endpoint in ("completions", "chat"):
        prompt = read_prompt(endpoint, body)
        prompt.tokens(4.0)
        prompt.chunk_hashes(4)
        if prompt.whole_reason is None:
            assert json.loads(prefill_body(prompt))["max_tokens"] == 1


def test_deep_nesting_is_left_to_the_instance():
    prompt = read_prompt("completions", b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    assert prompt.document is None


def test_chat_shapes_that_are_wrong_are_left_to_the_instance():
    for messages in (None, "x", [1], {}):
        prompt = read_prompt("chat", json.dumps({"messages": messages}).encode())
        assert prompt.whole_reason == "malformed"


def test_pictures_do_not_count_as_text():
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 400_000}}
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}, part]}]}
    prompt = read_prompt("chat", json.dumps(body).encode())
    assert 512 <= prompt.tokens(4.0) < 600
    other = json.loads(json.dumps(body).replace("AAAA", "AAAB", 1))
    assert read_prompt("chat", json.dumps(other).encode()).text != prompt.text


def test_chunk_hashes_chain():
    ids = list(range(40))
    hashes = read_prompt("completions", json.dumps({"prompt": ids}).encode()).chunk_hashes(16)
    longer = read_prompt("completions", json.dumps({"prompt": [*ids, *ids]}).encode()).chunk_hashes(16)
    changed = read_prompt("completions", json.dumps({"prompt": [99, *ids[1:]]}).encode()).chunk_hashes(16)
    assert len(hashes) == 2
    assert longer[:2] == hashes
    assert not set(changed) & set(hashes)


def test_prefill_answer():
    raw = b'{"kv_transfer_params": {"a": 0.10}, "usage": {"prompt_tokens": 7}, "choices": []}'
    assert read_prefill_answer(raw) == (b'{"a": 0.10}', 7)
    assert read_prefill_answer(b'{"kv_transfer_params": null}') == (None, 0)
    assert read_prefill_answer(b"{}") == (None, 0)


def test_chunks_of_a_prompt_line_up_with_its_media():
    """What stands before a picture shares chunks with any picture behind it, what follows another picture does not."""

    def hashes(*content):
        body = {"messages": [{"role": "user", "content": list(content)}]}
        prompt = read_prompt("chat", json.dumps(body).encode())
        return prompt.chunk_hashes(16), prompt.tokens(4.0)

    def picture(data):
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data * 64}"}}

    text = {"type": "text", "text": "word " * 60}
    first, tokens = hashes(text, picture("AAAA"), text)
    second, _ = hashes(text, picture("BBBB"), text)
    shared = sum(one == other for one, other in zip(first, second, strict=True))
    assert shared == pytest.approx(300 / 64, abs=1)
    assert not set(first[shared:]) & set(second)
    assert tokens == pytest.approx(512 + 150, abs=20)
    # A long medium is compared by its length and its ends.
    assert hashes(picture("AAAA" * 100_000))[0] != hashes(picture("AAAB" * 100_000))[0]
