"""What the encoder demo runs: two encoders, one prefill and one decode instance, and its requests with pictures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_suite.fleet.demo_pictures import picture_request
from vllm_suite.fleet.demo_spec import SERVED_NAME, free_ports
from vllm_suite.fleet.launch import Launch
from vllm_suite.fleet.launch_front import plan_router, router_config
from vllm_suite.fleet.pictures import SIZES
from vllm_suite.fleet.pictures_parts import Part, image_part
from vllm_suite.fleet.replay import Request
from vllm_suite.fleet.spec import FleetSpec
from vllm_suite.fleet.state_file import write_atomically

ENCODERS = 2
# A slow tower beside a small language model: encoding is most of a request, as with large pictures on a real one.
TOWER = {"vision_layers": 12, "vision_hidden": 512}
_MAX_MODEL_LEN = 4096
_CPU_KV_CACHE = "256MiB"
_TIMED_SIZE = (336, 336)


@dataclass(frozen=True)
class EpdOptions:
    """Settings of one run. `model` None means the tiny checkpoint, made in `folder`.

    `pictures` is the number in each request of the timed phase, `rounds` how often that request is sent.
    """

    model: str | None = None
    max_tokens: int = 16
    pictures: int = 8
    rounds: int = 4
    seed: int = 0
    folder: Path = Path("build/demo-epd")


def epd_fleet(options: EpdOptions, model: str) -> FleetSpec:
    """2 encoders, 1 prefill, 1 decode and a router. Raises OSError where no ports are free."""
    instances = ENCODERS + 2
    first = free_ports(2 + 2 * instances + ENCODERS)
    engine: dict[str, Any] = {"generation_config": "vllm", "dtype": "float32", "max_model_len": _MAX_MODEL_LEN}
    engine |= {"max_num_seqs": 8, "kv_cache_memory_bytes": _CPU_KV_CACHE}
    # Start-up encodes the largest item that is allowed: without this a long film, half a minute on a busy core.
    engine["limit_mm_per_prompt"] = {"image": {"count": options.pictures, "width": 672, "height": 672}, "video": 0}
    return FleetSpec.model_validate(
        {
            "name": "demo-epd",
            "model": model,
            "served_model_name": SERVED_NAME,
            "plugins": ["disagg", "epd"],
            "engine": engine,
            "env": {"HF_HUB_OFFLINE": "1"} if options.model is None else {},
            "pools": {"encode": {"replicas": ENCODERS}, "prefill": {}, "decode": {}},
            "router": {
                "port": first,
                "disaggregation": {"min_prompt_tokens": 0, "max_cached_fraction": 1.0},
                # Whole pictures go to whichever encoder has less to do, and prefill waits for all of them, so that the
                # time of the stage is the time of encoding.
                "encode": {"policy": "least_encode_tokens", "overlap": "never"},
            },
            "local": {
                "first_port": first + 2,
                "first_side_channel_port": first + 2 + instances,
                "first_item_port": first + 2 + 2 * instances,
                "share_gpus": True,
                "start_timeout": "300s",
                "log_dir": str(options.folder / "logs"),
            },
        }
    )


def router_over(fleet: FleetSpec, instances: Sequence[Launch], name: str, port: int) -> tuple[FleetSpec, Launch]:
    """One more router, over some of a fleet's instances; writes its configuration into a folder `name` of its own."""
    local = fleet.local.model_copy(update={"log_dir": fleet.local.log_dir / name})
    router = fleet.router.model_copy(update={"port": port})
    spec = fleet.model_copy(update={"name": f"{fleet.name}-{name}", "local": local, "router": router})
    local.log_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(local.log_dir / "router.yaml", router_config(spec, list(instances)))
    return spec, plan_router(spec, list(instances))


@dataclass(frozen=True)
class Workload:
    """Requests of the demo's phases, with the media parts in each."""

    mixed: list[Request]
    repeated: list[Request]
    timed: Request
    rounds: int

    def round(self, index: int, salt: str) -> Request:
        """The timed request as number `index`; another salt makes its pictures new to every cache."""
        return Request(index, 0.0, self.timed.path, {**self.timed.body, "cache_salt": salt})


def workload(options: EpdOptions) -> Workload:
    """Pictures of every size alone, several at once, text alone; then the same pictures in other requests."""
    draw = random.Random(options.seed)
    shown = [image_part(width, height, options.seed + i) for i, (width, height) in enumerate(SIZES)]
    groups: list[list[Part]] = [[part] for part in shown]
    groups += [shown[1:4], shown[4:8], [], []]
    mixed = [picture_request(options.max_tokens, index, parts, draw) for index, parts in enumerate(groups)]
    again = [shown[2:4], [shown[7]], shown[0:2], [shown[6], shown[5]], [shown[4]], shown[3:5]]
    repeated = [picture_request(options.max_tokens, len(mixed) + i, parts, draw) for i, parts in enumerate(again)]
    fresh = [image_part(*_TIMED_SIZE, options.seed + 1000 + i) for i in range(options.pictures)]
    return Workload(mixed, repeated, picture_request(options.max_tokens, -1, fresh, draw), options.rounds)
