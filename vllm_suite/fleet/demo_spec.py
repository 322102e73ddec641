"""What the demo runs: a fleet of one prefill and one decode instance, and the plain engine beside it."""

from __future__ import annotations

import json
import random
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_suite.fleet.launch import Launch, plan_instances, usable_gpus
from vllm_suite.fleet.spec import FleetSpec
from vllm_suite.fleet.tiny_tokenizer import FIRST_TEXT_ID, RESERVED, VOCAB_SIZE

_CPU_KV_CACHE = "256MiB"
_TINY_MAX_MODEL_LEN = 2048
# A language model of four layers, small enough for three engines on two cores; the encoder is cheap.
TINY = {"text_layers": 4, "text_hidden": 256}
# Start-up encodes the largest item that is allowed: without this a long film, half a minute on a busy core.
_TINY_MEDIA = {"image": {"count": 2, "width": 336, "height": 336}, "video": 0}
SERVED_NAME = "demo"


@dataclass(frozen=True)
class DemoOptions:
    """Settings of one demo. `model` None means the tiny checkpoint, made in `folder`."""

    model: str | None = None
    trace: Path | None = None
    requests: int = 48
    max_tokens: int = 32
    duration_s: float = 20.0
    seed: int = 0
    dtype: str | None = None
    max_model_len: int | None = None
    batch_invariant: bool = True
    folder: Path = Path("build/demo")


def demo_fleet(options: DemoOptions, model: str) -> FleetSpec:
    """1 prefill, 1 decode and a router that sends every request through both. Raises DeviceError."""
    first = free_ports(5)
    engine: dict[str, Any] = {"generation_config": "vllm"}
    env: dict[str, str] = {}
    on_gpu = bool(usable_gpus(FleetSpec.model_validate({"model": model, "pools": {"any": {}}})))
    if on_gpu:
        if options.batch_invariant:
            # Batches differ between the fleet and the single engine; without this their sums may too.
            env["VLLM_BATCH_INVARIANT"] = "1"
    else:
        # In bfloat16 two logits are often exactly equal, and which one wins depends on the batch.
        engine |= {"dtype": "float32", "max_num_seqs": 8}
    if options.model is None:
        engine |= {"dtype": "float32", "max_model_len": _TINY_MAX_MODEL_LEN, "limit_mm_per_prompt": _TINY_MEDIA}
        env["HF_HUB_OFFLINE"] = "1"
        if not on_gpu:
            engine["kv_cache_memory_bytes"] = _CPU_KV_CACHE
    if options.dtype is not None:
        engine["dtype"] = options.dtype
    if options.max_model_len is not None:
        engine["max_model_len"] = options.max_model_len
    return FleetSpec.model_validate(
        {
            "name": "demo",
            "model": model,
            "served_model_name": SERVED_NAME,
            "engine": engine,
            "env": env,
            "pools": {"prefill": {}, "decode": {}},
            "router": {
                "port": first,
                # Short prompts would go straight to decode; here every one has to cross.
                "disaggregation": {"min_prompt_tokens": 0, "max_cached_fraction": 1.0},
            },
            "local": {
                "first_port": first + 1,
                "first_side_channel_port": first + 3,
                "share_gpus": True,
                "start_timeout": "300s" if options.model is None else "30m",
                "log_dir": str(options.folder / "logs"),
            },
        }
    )


def prompt_ids(options: DemoOptions) -> range:
    """Token ids that are plain text in the model's vocabulary, to draw prompts from."""
    if options.model is None:
        return range(FIRST_TEXT_ID, VOCAB_SIZE - RESERVED)
    # The common vocabularies keep special tokens and bytes below 300 or far above 5000.
    size = _vocab_size(Path(options.model) / "config.json") or 5000
    return range(min(300, size // 4), min(5000, size))


def _vocab_size(config: Path) -> int | None:
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a hub name, which has no folder
        return None
    size = data.get("vocab_size") or data.get("text_config", {}).get("vocab_size")
    return int(size) if size else None


def single_engine(fleet: FleetSpec) -> tuple[FleetSpec, list[Launch]]:
    """The same model and flags on one plain `vllm serve`: no plugin of the suite, no connector, no router."""
    pools = type(fleet.pools).model_validate({"any": {}})
    spec = fleet.model_copy(update={"name": "single", "plugins": (), "pools": pools})
    return spec, plan_instances(spec)


def free_ports(count: int, host: str = "127.0.0.1") -> int:
    """The first of `count` consecutive ports that are free now. Raises OSError where none were found."""
    draw = random.SystemRandom()
    for _ in range(200):
        # Below the range from which the kernel takes ports for outgoing connections.
        first = draw.randrange(20_000, 32_000 - count)
        sockets: list[socket.socket] = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
                sockets[-1].bind((host, port))
        except OSError:
            continue
        else:
            return first
        finally:
            for probe in sockets:
                probe.close()
    raise OSError(f"no {count} consecutive free ports between 20000 and 32000")
