"""What the router has to know of a request's body: its length, its prefix, and whether it can be split into
prefill and decode.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from vllm_suite.router.encode.parts import is_media
from vllm_suite.router.members import hash64

Endpoint = Literal["completions", "chat"]

# A picture becomes some hundreds of tokens in most vision models; the exact number is the model's secret.
NON_TEXT_PART_TOKENS = 512
# Media are compared for routing only: of long ones by length, beginning and end.
_SAMPLED = 1 << 20
_SAMPLE = 1 << 16
# Output length assumed for load accounting where the request sets none.
DEFAULT_OUTPUT_TOKENS = 256
# Bytes a text chunk has per chunk token. Fixed, so that chunk borders do not move while the ratio is learned.
CHUNK_BYTES_PER_TOKEN = 4
# Times that the hash of a medium is repeated to be as long as the medium's tokens.
_STAND_IN_WORDS = NON_TEXT_PART_TOKENS * CHUNK_BYTES_PER_TOKEN // 8

_decode = msgspec.json.Decoder().decode
_strict = msgspec.json.Encoder().encode


@dataclass(slots=True)
class Prompt:
    """A request's facts. `document` is None where the body is no JSON object; vLLM then words the error."""

    endpoint: Endpoint
    body: bytes
    document: dict[str, Any] | None
    standard: bool  # strict UTF-8 JSON; otherwise Python's wider dialect, which vLLM accepts too
    model: str | None
    whole_reason: str | None  # why prefill and decode cannot be split, None where they can
    token_ids: list[int] | None
    text: bytes
    extra_tokens: int  # of parts that are no text
    has_media: bool
    stand_in: int  # bytes in `text` that stand for media
    output_tokens: int
    limited: bool = False  # `output_tokens` is what the request allows

    def tokens(self, bytes_per_token: float) -> int:
        """Prompt length: exact for token ids, estimated for text."""
        if self.token_ids is not None:
            return len(self.token_ids)
        return int((len(self.text) - self.stand_in) / bytes_per_token) + self.extra_tokens

    def chunk_hashes(self, chunk_tokens: int) -> list[int]:
        """Chained 64-bit hashes of the prompt's whole chunks; the rest at the end has none.

        Model and cache salt go in first: equal text under another of either shares no cached block.
        """
        salt = self.document.get("cache_salt") if self.document else None
        value = hash64(_encode((self.model, salt if isinstance(salt, str) else None)))
        hashes = []
        ids = self.token_ids
        if ids is not None:
            for end in range(chunk_tokens, len(ids) + 1, chunk_tokens):
                value = hash64(_encode(ids[end - chunk_tokens : end]), value)
                hashes.append(value)
            return hashes
        size = chunk_tokens * CHUNK_BYTES_PER_TOKEN
        for end in range(size, len(self.text) + 1, size):
            value = hash64(self.text[end - size : end], value)
            hashes.append(value)
        return hashes

    def prefix_key(self, hashes: list[int], chunk_tokens: int, prefix_tokens: int) -> int:
        """One hash of the prompt's first `prefix_tokens`, in whole chunks; of all of a shorter prompt."""
        chunks = min(max(prefix_tokens // chunk_tokens, 1), len(hashes))
        if chunks:
            return hashes[chunks - 1]
        return hash64(_encode((self.model, self.token_ids)) if self.token_ids is not None else self.text)


def _encode(value: Any) -> bytes:
    """As JSON. What only Python's parser takes, a lone half of a surrogate pair, only its encoder gives."""
    try:
        return _strict(value)
    except UnicodeEncodeError:
        return json.dumps(value).encode()


def parse_object(body: bytes) -> tuple[dict[str, Any] | None, bool]:
    """The JSON object in `body`, or None, and whether it is standard UTF-8 JSON.

    What the strict parser refuses is tried with the parser vLLM's server uses (NaN, byte-order mark, UTF-16),
    so that nothing passes as unparsed here that an instance would understand.
    """
    standard = True
    try:
        found = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        standard = False
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            return None, False
    return (found, standard) if isinstance(found, dict) else (None, standard)


def read_prompt(endpoint: Endpoint, body: bytes) -> Prompt:
    """Parse a body. Never raises: what cannot be used is marked so and left to vLLM."""
    document, standard = parse_object(body)
    prompt = Prompt(endpoint, body, document, standard, None, "unparsed", None, b"", 0, False, 0, DEFAULT_OUTPUT_TOKENS)
    if document is None:
        return prompt
    model = document.get("model")
    prompt.model = model if isinstance(model, str) else None
    limit = document.get("max_tokens")
    if endpoint == "chat":
        limit = document.get("max_completion_tokens", limit)
    if type(limit) is int and 0 < limit < 1 << 31:
        prompt.output_tokens, prompt.limited = limit, True
    understood = _chat(prompt, document) if endpoint == "chat" else _completion(prompt, document)
    prompt.whole_reason = (understood or _whole_reason(document, limit)) if standard else "unparsed"
    return prompt


def _completion(prompt: Prompt, document: dict[str, Any]) -> str | None:
    """Fill in the prompt; the reason why it stays whole, if there is one."""
    found = document.get("prompt")
    if document.get("prompt_embeds") is not None:
        return "prompt_embeds"
    if isinstance(found, list) and found and isinstance(found[0], (str, list)):
        if len(found) > 1:
            prompt.text = _encode(found)
            return "batch"
        found = found[0]
    if isinstance(found, str):
        prompt.text = found.encode("utf-8", "surrogatepass")
        return None
    if isinstance(found, list) and all(type(token) is int for token in found):
        prompt.token_ids = found
        return None
    return "malformed"


def _chat(prompt: Prompt, document: dict[str, Any]) -> str | None:
    messages = document.get("messages")
    if not isinstance(messages, list):
        return "malformed"
    pieces: list[bytes] = []
    if document.get("tools"):
        pieces.append(_encode(document["tools"]))
    for message in messages:
        if not isinstance(message, dict):
            return "malformed"
        pieces.append(str(message.get("role")).encode("utf-8", "surrogatepass"))
        content = message.get("content")
        if isinstance(content, str):
            pieces.append(content.encode("utf-8", "surrogatepass"))
        elif content is not None:
            if isinstance(content, list) and any(is_media(part) for part in content):
                _mixed(prompt, pieces, content)
            else:
                pieces.append(_encode(content))
        if message.get("tool_calls"):
            pieces.append(_encode(message["tool_calls"]))
    prompt.text = b"\n".join(pieces)
    return None


def _mixed(prompt: Prompt, pieces: list[bytes], content: list[Any]) -> None:
    """Parts in order, media among them as long as they are in tokens, so that chunks of the prompt line up."""
    for part in content:
        if not is_media(part):
            pieces.append(_encode(part))
            continue
        prompt.has_media = True
        prompt.extra_tokens += NON_TEXT_PART_TOKENS
        stand_in = hash64(_encode(_sample(part))).to_bytes(8, "little") * _STAND_IN_WORDS
        prompt.stand_in += len(stand_in)
        pieces.append(stand_in)


def _sample(value: Any, depth: int = 0) -> Any:
    """What is hashed of media parts in the place of all of them: megabytes would hold up the event loop."""
    if isinstance(value, str) and len(value) > _SAMPLED:
        return [len(value), value[:_SAMPLE], value[-_SAMPLE:]]
    if depth < 4 and isinstance(value, dict):
        return {key: _sample(inner, depth + 1) for key, inner in value.items()}
    if depth < 4 and isinstance(value, list):
        return [_sample(inner, depth + 1) for inner in value]
    return value


def _whole_reason(document: dict[str, Any], limit: object) -> str | None:
    """Why one instance must do all of this request, or None.

    Several sequences would each pull the same reference, and prompt log-probabilities come only from the
    instance that runs the prompt. A wrong type goes to decode whole, so that vLLM judges the body as sent.
    """
    get = document.get
    if limit is not None and (type(limit) is not int or limit < 1):
        return "output_limit"
    if get("n") not in (None, 1) or get("best_of") not in (None, 1):
        return "several_sequences"
    if get("use_beam_search"):
        return "beam_search"
    if get("prompt_logprobs") is not None or get("echo"):
        return "prompt_output"
    return None
