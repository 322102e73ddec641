"""What a reference says about one engine and one request, and the checks a consumer makes without the network."""

from __future__ import annotations

import json
import os
from typing import Any

import msgspec

from vllm_suite.compat.fence import model_digest
from vllm_suite.handoff import Handoff, Refusal, digest, parse

# Where the fence travels inside vLLM's own `kv_transfer_params`.
FENCE_KEY = "suite"


class RemoteParams(msgspec.Struct, frozen=True):
    """The part of ``kv_transfer_params`` that names remote blocks, as vLLM's pull connector returns it.

    Attributes:
        remote_block_ids: block ids by KV cache group.
        remote_num_tokens: tokens whose KV those blocks hold.
    """

    remote_block_ids: list[list[int]]
    remote_engine_id: str
    remote_request_id: str
    remote_host: str
    remote_port: int
    remote_num_tokens: int
    tp_size: int = 1
    dcp_size: int = 1
    pp_size: int = 1
    transfer_mode: str = "pull"

    def location(self) -> str:
        """Digest over every field; the fence's ``location``."""
        return digest(msgspec.json.encode(self))


def remote_params(params: dict[str, Any]) -> RemoteParams | Refusal:
    """Read the remote part of ``params``; ``MALFORMED`` for wrong types or values no producer returns."""
    try:
        remote = msgspec.convert(params, RemoteParams, strict=True)
    except msgspec.ValidationError:
        return Refusal.MALFORMED
    sizes_sane = min(remote.tp_size, remote.dcp_size, remote.pp_size) >= 1 and 0 < remote.remote_port < 65536
    blocks_sane = all(block >= 0 for group in remote.remote_block_ids for block in group)
    if not (sizes_sane and blocks_sane and remote.remote_num_tokens >= 0 and remote.transfer_mode == "pull"):
        return Refusal.MALFORMED
    return remote


def content_digest(request: Any) -> str:
    """What is being prefilled: token ids or embeddings, images and audio, LoRA adapter and cache salt.

    Args:
        request: vLLM's scheduler-side ``Request``, before a producer truncates its prompt.
    """
    if request.prompt_token_ids is not None:
        import numpy as np

        prompt = np.asarray(request.prompt_token_ids, dtype="<i8").tobytes()
    else:
        import torch

        # As bytes: numpy has no bfloat16.
        prompt = request.prompt_embeds.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    media = [(item.identifier, item.mm_position.offset, item.mm_position.length) for item in request.mm_features or ()]
    lora = request.lora_request.lora_name if request.lora_request is not None else ""
    return digest(prompt, json.dumps(media), lora, request.cache_salt or "")


def layout_digest(vllm_config: Any) -> str:
    """KV layout, dtype, heads and kind of device: what the bytes of one block mean.

    Parallel sizes and block size are left to the NIXL handshake, which supports some that differ.
    """
    from vllm.platforms import current_platform

    model, cache = vllm_config.model_config, vllm_config.cache_config
    device = current_platform.device_type
    if device == "cpu":
        # CPU attention packs keys by instruction set; blocks of one kind mean nothing to another.
        import torch

        device += "/" + torch.backends.cpu.get_cpu_capability()
    return digest(
        device,
        str(model.dtype),
        str(cache.cache_dtype),
        str(cache.kv_cache_layout),
        str(model.use_mla),
        str(model.get_total_num_kv_heads()),
        str(model.get_head_size()),
        str(model.get_total_num_hidden_layers()),
        str(vllm_config.speculative_config is not None),
        os.environ.get("VLLM_SSM_CONV_STATE_LAYOUT", ""),
    )


class OwnView:
    """What this engine expects of a reference made for it; computed once.

    Args:
        key: the fleet's signing key, or None.
    """

    def __init__(self, vllm_config: Any, key: bytes | None) -> None:
        self.model = model_digest(vllm_config)
        self.layout = layout_digest(vllm_config)
        self.key = key

    def check(self, params: dict[str, Any], content: str, tokens: int) -> Handoff | Refusal:
        """Everything that can be checked without asking the producer, in the order that opens least.

        Args:
            params: the request's ``kv_transfer_params``.
            content: digest of the consumer's own prompt.
            tokens: prompt tokens whose KV the consumer needs.
        """
        ref = parse(params.get(FENCE_KEY))
        if isinstance(ref, Refusal):
            return ref
        remote = remote_params(params)
        if isinstance(remote, Refusal):
            return remote
        return ref.check_signature(self.key) or self._compare(ref, remote, content, tokens) or ref

    def _compare(self, ref: Handoff, remote: RemoteParams, content: str, tokens: int) -> Refusal | None:
        if ref.model != self.model:
            return Refusal.FOREIGN_MODEL
        if ref.layout != self.layout:
            return Refusal.FOREIGN_LAYOUT
        if ref.content != content:
            return Refusal.FOREIGN_CONTENT
        if ref.location != remote.location() or ref.request_id != remote.remote_request_id:
            return Refusal.TAMPERED
        if min(ref.tokens, remote.remote_num_tokens) < tokens or not any(remote.remote_block_ids):
            return Refusal.TRUNCATED
        return None
