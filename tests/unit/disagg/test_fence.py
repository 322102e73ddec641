"""What a reference says was computed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_disagg.fence import content_digest


def request(**changes: Any) -> SimpleNamespace:
    fields: dict[str, Any] = {
        "prompt_token_ids": [1, 2, 3],
        "prompt_embeds": None,
        "mm_features": [],
        "lora_request": None,
        "cache_salt": None,
    }
    return SimpleNamespace(**{**fields, **changes})


def test_tokens_adapter_and_salt_count() -> None:
    image = SimpleNamespace(identifier="a", mm_position=SimpleNamespace(offset=0, length=2))
    others = [
        request(prompt_token_ids=[1, 2, 4]),
        request(lora_request=SimpleNamespace(lora_name="x")),
        request(cache_salt="s"),
        request(mm_features=[image]),
    ]
    digests = {content_digest(r) for r in [request(), *others]}
    assert len(digests) == 5
    assert content_digest(request()) == content_digest(request())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_of_any_dtype_count(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    rows = torch.arange(6, dtype=getattr(torch, dtype)).view(2, 3)
    one = request(prompt_token_ids=None, prompt_embeds=rows)
    assert content_digest(one) == content_digest(request(prompt_token_ids=None, prompt_embeds=rows.clone()))
    assert content_digest(one) != content_digest(request(prompt_token_ids=None, prompt_embeds=rows + 1))
