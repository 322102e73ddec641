"""What the plugin can do on this machine, for ``vllm-suite doctor``."""

from __future__ import annotations

import importlib
import importlib.util
from importlib import metadata
from typing import Any

from vllm_epd.options import CONNECTOR, CONNECTOR_MODULE, MANAGER, SCHEDULER

# What vLLM's front end needs to read media, by kind: modules and the distributions that bring them.
_READERS = {
    "images": (("PIL", "pillow"), ("torchvision", "torchvision")),
    "video": (("cv2", "opencv-python-headless"), ("torchvision", "torchvision")),
    "audio": (("soundfile", "soundfile"), ("torchaudio", "torchaudio")),
}


def report() -> dict[str, Any]:
    """``broken``: why no encoder output can be moved here (None where one can); ``parts``: each part in words.

    Imports vLLM; run it in a process of its own.
    """
    broken = None
    for path in (f"{CONNECTOR_MODULE}.{CONNECTOR}", MANAGER, SCHEDULER):
        module, _, name = path.rpartition(".")
        try:
            getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, RuntimeError) as error:
            broken = broken or f"{path}: {error}"
    parts = {"transfer": _transfer(), "model runner": _runner()}
    return {"broken": broken, "parts": parts | {kind: _reader(kind) for kind in _READERS}}


def _transfer() -> str:
    if importlib.util.find_spec("nixl") is None:
        return "off: nixl is not installed"
    import torch

    memory = "VRAM" if torch.cuda.is_available() else "DRAM"
    return f"NIXL {_version('nixl')} over UCX, {memory} to {memory}"


def _runner() -> str:
    from vllm.triton_utils import HAS_TRITON

    return "V1 and V2" if HAS_TRITON else "V1; V2 needs Triton for this device"


def _reader(kind: str) -> str:
    """Whether the libraries load: one may be installed and built for another torch."""
    found: list[str] = []
    for module, distribution in _READERS[kind]:
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            return f"off: {distribution}: {error}"
        found.append(f"{distribution} {_version(distribution)}")
    return "on: " + ", ".join(dict.fromkeys(found))


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of unknown version"
