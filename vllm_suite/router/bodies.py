"""Bodies on their way to instances: what is taken out, and what prefill and decode get."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from vllm_suite.router.prompt import Prompt

# Fields by which one instance tells another where its blocks are. From outside they would make an engine
# connect to any address and read any block.
TRANSFER_FIELDS = ("kv_transfer_params", "ec_transfer_params")

# vLLM's own contract for "prefill this and keep the blocks for a pull".
_PREFILL_PARAMS: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}

# Left out for prefill: they shape an answer that nobody reads, and some contradict one unstreamed token.
_NOT_FOR_PREFILL = frozenset(
    {"stream_options", "min_tokens", "n", "best_of", "logprobs", "top_logprobs", "logprob_token_ids"}
)

_encode = msgspec.json.Encoder().encode


def strip_transfer_fields(prompt: Prompt) -> list[str]:
    """Remove the transfer fields from a body that came from outside; the names of those found.

    vLLM merges `vllm_xargs` into the place where it keeps these fields, so they are looked for there too.
    """
    document = prompt.document
    if document is None:
        return []
    found = [name for name in TRANSFER_FIELDS if name in document]
    for name in found:
        del document[name]
    xargs = document.get("vllm_xargs")
    if isinstance(xargs, dict):
        for name in TRANSFER_FIELDS:
            if name in xargs:
                del xargs[name]
                found.append(f"vllm_xargs.{name}")
    if found:
        # Python's encoder keeps what only Python's parser reads (NaN among them) as it was.
        prompt.body = _encode(document) if prompt.standard else json.dumps(document).encode()
    return found


def prefill_body(prompt: Prompt, document: dict[str, Any] | None = None) -> bytes:
    """The client's request cut down to one unstreamed token, blocks kept for a pull.

    `document` is what the encode stage made of the client's, where it has made something.
    """
    found = prompt.document if document is None else document
    assert found is not None
    document = {key: value for key, value in found.items() if key not in _NOT_FOR_PREFILL}
    document["max_tokens"] = 1
    if prompt.endpoint == "chat":
        document["max_completion_tokens"] = 1
    document["stream"] = False
    document["kv_transfer_params"] = _PREFILL_PARAMS
    return _encode(document)


def decode_body(prompt: Prompt, reference: bytes, body: bytes | None = None) -> bytes:
    """The client's own bytes with the reference of prefill put in as the last field.

    The body is a JSON object without that field (`strip_transfer_fields`), so it can be spliced in without
    encoding the prompt again. `body` is what the encode stage made of it, where it has made something.
    """
    head = (prompt.body if body is None else body).rstrip()[:-1].rstrip()
    comma = b"," if prompt.document else b""
    return b'%b%b"kv_transfer_params":%b}' % (head, comma, reference)


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0


class PrefillAnswer(msgspec.Struct):
    """The two fields of prefill's answer that matter; the reference stays as the bytes it came in."""

    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"null")
    usage: _Usage | None = None


class _Times(msgspec.Struct, frozen=True):
    queue_s: float = 0.0


class _Timed(msgspec.Struct):
    suite_times: _Times = _Times()


_decode_times = msgspec.json.Decoder(_Timed).decode
_decode_answer = msgspec.json.Decoder(PrefillAnswer).decode


def read_prefill_answer(body: bytes) -> tuple[bytes | None, int]:
    """The reference as JSON bytes (None where prefill gave none) and the exact prompt length (0: unknown).

    Raises `msgspec.DecodeError` for a body that is no such answer.
    """
    answer = _decode_answer(body)
    reference = bytes(answer.kv_transfer_params)
    tokens = answer.usage.prompt_tokens if answer.usage else 0
    return (reference if reference.startswith(b"{") and reference != b"{}" else None), tokens


def prefill_queue_s(reference: bytes) -> float:
    """Seconds that a request waited in prefill's queue, as plugin `disagg` says beside the reference; 0 elsewhere."""
    if b'"suite_times"' not in reference:
        return 0.0
    try:
        return _decode_times(reference).suite_times.queue_s
    except msgspec.DecodeError:
        return 0.0
