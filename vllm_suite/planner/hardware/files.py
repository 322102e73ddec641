"""Reading hardware: the devices of the package, and those of a user's file."""

from __future__ import annotations

import re
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import yaml
from pydantic import ValidationError

from vllm_suite.planner.hardware.device import Cluster, Device, HardwareError

_FOLDER = Path(__file__).with_name("devices")


def devices(extra: Path | None = None) -> dict[str, Device]:
    """Every known device by its name in lower case.

    Args:
        extra: a YAML file of devices, one or a list; one of a known name takes its place.

    Raises:
        HardwareError: the file cannot be read; the text names file, key and what was expected.
    """
    found = dict(_bundled())
    if extra is not None:
        found |= {each.name.lower(): each for each in _read(extra)}
    return found


def device(name: str, extra: Path | None = None) -> Device:
    """One device by its name, in any case. Raises HardwareError."""
    known = devices(extra)
    if name.lower() in known:
        return known[name.lower()]
    close = [each for key, each in known.items() if key.startswith(name.lower())]
    if len(close) == 1:
        return close[0]
    names = {key: each.name for key, each in known.items()}
    near = [key for key in names if name.lower().startswith(key)] or get_close_matches(name.lower(), names, 1)
    hint = f"; did you mean {names[near[0]]}?" if near else "."
    raise HardwareError(f"no hardware {name!r}; known: {', '.join(names.values())}{hint}"
                        " Others: a file of your own, --hardware FILE")  # fmt: skip


def cluster(text: str, extra: Path | None = None) -> Cluster:
    """From ``8xH200``, or ``H200`` for one. Raises HardwareError."""
    found = re.fullmatch(r"(?:(\d+)\s*x\s*)?([A-Za-z].*)", text.strip())
    turned = re.fullmatch(r"(.+?)\s*[x*]\s*(\d+)", text.strip())
    if found is not None and turned is not None and turned[1].lower() in devices(extra):
        raise HardwareError(f"hardware is written as {turned[2]}x{turned[1]}, not {text!r}")
    if found is None or int(found[1] or 1) == 0:
        raise HardwareError(f"hardware is written as 8xH200, not {text!r}")
    return Cluster(device=device(found[2], extra), gpus=int(found[1] or 1))


@cache
def _bundled() -> dict[str, Device]:
    return {each.name.lower(): each for path in sorted(_FOLDER.glob("*.yaml")) for each in _read(path)}


def _read(path: Path) -> list[Device]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HardwareError(f"{path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise HardwareError(f"{path}: not YAML: {error}") from error
    entries = data if isinstance(data, list) else [data]
    try:
        return [Device.model_validate(each) for each in entries]
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, each['loc']))}: {each['msg']} (got {each['input']!r})" for each in error.errors()]
        raise HardwareError(f"{path}: " + "; ".join(lines)) from error
