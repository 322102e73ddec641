"""Which GPUs there are and which instance gets which."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

_TIMEOUT_S = 10.0


class DeviceError(ValueError):
    """The machine does not have what the fleet asks for."""


def visible_gpus(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """GPUs this process may use, as words for CUDA_VISIBLE_DEVICES; empty where no NVIDIA driver answers.

    Honours a CUDA_VISIBLE_DEVICES that is set already.
    """
    limited = environ.get("CUDA_VISIBLE_DEVICES")
    if limited is not None:
        return tuple(word.strip() for word in limited.split(",") if word.strip())
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip().isdigit())


def assign(sizes: Sequence[int], gpus: Sequence[str], share: bool) -> list[tuple[str, ...]]:
    """GPUs for each instance, `sizes[i]` of them, each GPU to one instance unless `share`.

    With `share` the least used GPUs are taken. Raises DeviceError where there are too few.
    """
    if not share and sum(sizes) > len(gpus):
        raise DeviceError(
            f"the fleet needs {sum(sizes)} GPUs and {len(gpus)} can be used; lower replicas or "
            "tensor_parallel_size, or set local.share_gpus"
        )
    if max(sizes, default=0) > len(gpus):
        raise DeviceError(f"an instance needs {max(sizes)} GPUs and {len(gpus)} can be used")
    uses = dict.fromkeys(gpus, 0)
    order = {gpu: index for index, gpu in enumerate(gpus)}
    result: list[tuple[str, ...]] = []
    for size in sizes:
        chosen = sorted(sorted(gpus, key=lambda gpu: (uses[gpu], order[gpu]))[:size], key=order.__getitem__)
        for gpu in chosen:
            uses[gpu] += 1
        result.append(tuple(chosen))
    return result
