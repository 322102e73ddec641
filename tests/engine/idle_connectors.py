"""Connectors that do nothing but wait: what `vllm_suite.compat.engine_idle` asks of a connector, and the engine that
it is asked in. ``python idle_connectors.py MODEL FILE`` writes one JSON object with how often the engine tried.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorMetadata, ECConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole

from vllm_suite.compat import engine_idle

SECONDS = 2.0  # that a request waits for its item


class WaitingECConnector(ECConnectorBase):
    """Has each item `SECONDS` after it was first asked for. Sleeps as long as the engine lets it."""

    def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        self.asked: dict[str, float] = {}
        self.polls: dict[str, int] = {}
        self.wake: Callable[[], None] | None = None
        if role == ECConnectorRole.SCHEDULER:
            engine_idle.install()

    def set_wake(self, wake: Callable[[], None]) -> None:
        self.wake = wake

    def idle_wait_s(self, unfinished: bool) -> float:
        return 30.0 if unfinished else math.inf

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        name, now = request.request_id, time.monotonic()
        self.polls[name] = self.polls.get(name, 0) + 1
        if name not in self.asked:
            self.asked[name] = now
            threading.Timer(SECONDS, lambda: self.wake and self.wake()).start()
        return now - self.asked[name] >= SECONDS

    def request_finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        return False, {"polls": self.polls.pop(request.request_id)}

    def has_cache_item(self, identifier: str) -> bool:
        return False

    def update_state_after_alloc(self, request: Any, index: int) -> None: ...

    def build_connector_meta(self, scheduler_output: Any) -> ECConnectorMetadata:
        return ECConnectorMetadata()

    def start_load_caches(self, encoder_cache: Any, **kwargs: Any) -> None: ...

    def save_caches(self, encoder_cache: Any, mm_hash: str, **kwargs: Any) -> None: ...


class WaitingKVConnector(KVConnectorBase_V1):
    """Moves nothing. May sleep as long as the request of the moment says."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.wait_s = math.inf

    def set_wake(self, wake: Callable[[], None]) -> None: ...

    def idle_wait_s(self, unfinished: bool) -> float:
        return self.wait_s

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        self.wait_s = float(request.kv_transfer_params["wait_s"])
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None: ...

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None: ...

    def wait_for_save(self) -> None: ...


def main(model: str, file: Path) -> None:
    from PIL import Image
    from vllm import LLM, SamplingParams

    mine = "idle_connectors"
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=4,
        block_size=32,
        kv_cache_memory_bytes=16 << 20,
        enable_prefix_caching=False,
        ec_transfer_config={
            "ec_connector": "WaitingECConnector",
            "ec_connector_module_path": mine,
            "ec_role": "ec_consumer",
        },
        kv_transfer_config={
            "kv_connector": "WaitingKVConnector",
            "kv_connector_module_path": mine,
            "kv_role": "kv_both",
        },
    )

    def ask(wait_s: str) -> dict[str, float]:
        image = Image.new("RGB", (112, 112), "red")
        message = {"role": "user", "content": [{"type": "image_pil", "image_pil": image}]}
        params = SamplingParams(temperature=0, max_tokens=1, extra_args={"kv_transfer_params": {"wait_s": wait_s}})
        begun = time.monotonic()
        output = llm.chat([message], params, use_tqdm=False)[0]
        return {"seconds": time.monotonic() - begun, "polls": output.ec_transfer_params["polls"]}

    file.write_text(json.dumps({wait_s: ask(wait_s) for wait_s in ("inf", "0.1", "0")}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
