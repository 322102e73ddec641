"""What `vllm-suite doctor` finds out: one `Check` per fact, and a verdict per plugin."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal

from vllm_suite import __version__
from vllm_suite.catalog import ENV_PLUGINS, PLUGINS, PluginInfo
from vllm_suite.compat import allowlist, contracts, versions
from vllm_suite.identity import role
from vllm_suite.provenance import device_name, installed

Status = Literal["ok", "warn", "fail"]
PYTHON_SUPPORTED = ((3, 11), (3, 13))
DEFAULT_SIDE_CHANNEL_PORT = 5600


@dataclass(frozen=True)
class Check:
    """One fact. ``warn``: something may be missing; ``fail``: what depends on it cannot work."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True)
class Verdict:
    """Whether one plugin can be used here, and why not. ``reasons`` is empty where it can.

    ``parts`` is what the plugin says of its parts: what is on, what is off and why.
    """

    plugin: str
    requested: bool
    usable: bool
    reasons: tuple[str, ...]
    parts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """Everything found. ``answers`` are the raw results of the probes, by name."""

    checks: tuple[Check, ...]
    verdicts: tuple[Verdict, ...]
    answers: dict[str, dict[str, Any]]

    @property
    def ok(self) -> bool:
        """No check failed and every requested plugin can be used."""
        return all(c.status != "fail" for c in self.checks) and all(v.usable for v in self.verdicts if v.requested)


def diagnose(requested: Sequence[str], ports: Iterable[int], deadline_s: float) -> Diagnosis:
    """Look at this machine. Takes at most ``deadline_s`` plus a second or two.

    ``requested`` are names of `PLUGINS`; ``ports`` must be free for the result to be ok.
    """
    vllm_version = versions.installed_version()
    wanted = [name for name, there in (("vllm", vllm_version), ("nixl", installed("nixl"))) if there]
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = {name: pool.submit(probe, name, deadline_s) for name in wanted}
        checks = [_python(), Check("vllm-suite", "ok", __version__), _vllm(vllm_version)]
        checks += [_contracts(vllm_version), _bootstrap(), _plugin_gate(), _role()]
        checks += [_machine(), *_ports(ports)]
        answers = {name: future.result() for name, future in futures.items()}
    checks += [_vllm_platform(answers.get("vllm")), _nixl(answers.get("nixl"))]
    verdicts = tuple(_verdict(p, p.name in requested, checks, answers) for p in PLUGINS.values())
    return Diagnosis(tuple(checks), verdicts, answers)


def probe(name: str, deadline_s: float) -> dict[str, Any]:
    """Run one of `vllm_suite.compat.probes` in a process group of its own and end it at the deadline.

    Returns its answer, or ``{"error": text}``.
    """
    command = [sys.executable, "-m", "vllm_suite.compat.probes", name]
    # The doctor reports on the machine; a selection in the environment is judged by itself, not by the probes.
    env = {k: v for k, v in os.environ.items() if k != ENV_PLUGINS} | {"VLLM_LOGGING_LEVEL": "ERROR"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=env, start_new_session=True)
        try:
            status = process.wait(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {"error": f"no answer within {deadline_s:g} s"}
        lines, errors = _last_line(out), _last_line(err)
    if status != 0:
        return {"error": errors or f"ended with status {status}"}
    answer: dict[str, Any] = json.loads(lines)
    return answer


def _last_line(stream: Any) -> str:
    stream.seek(0)
    lines = stream.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _python() -> Check:
    low, high = PYTHON_SUPPORTED
    ok = low <= sys.version_info[:2] <= high
    return Check("python", "ok" if ok else "fail", f"{platform.python_version()} (supported: 3.11 to 3.13)")


def _vllm(version: str | None) -> Check:
    if version is None:
        return Check("vllm", "warn", f"not installed; instances need vLLM {versions.SUPPORTED_RANGE}")
    supported = versions.series(version) in versions.SUPPORTED
    return Check("vllm", "ok" if supported else "fail", f"{version} (supported: {versions.SUPPORTED_RANGE})")


def _contracts(version: str | None) -> Check:
    name, root = "vllm contracts", contracts.installed_root()
    release = versions.series(version or "")
    if root is None or release not in versions.SUPPORTED:
        return Check(name, "warn", "no supported vLLM to check")
    rows = contracts.rows_for(release)
    problems = contracts.check(root, rows)
    if problems:
        return Check(name, "fail", f"{len(problems)} of {len(rows)} broken: " + "; ".join(problems[:3]))
    return Check(name, "ok", f"{len(rows)} private names and signatures are as expected")


def _bootstrap() -> Check:
    points = {point.name for point in metadata.entry_points(group="vllm.general_plugins")}
    there = allowlist.BOOTSTRAP in points
    return Check("entry point", "ok" if there else "fail", "registered" if there else "vllm-suite is not installed")


def _plugin_gate() -> Check:
    value = os.environ.get(allowlist.ENV)
    if value is None or allowlist.BOOTSTRAP in value.split(","):
        return Check("VLLM_PLUGINS", "ok", "not set" if value is None else f"names {allowlist.BOOTSTRAP}")
    return Check("VLLM_PLUGINS", "fail", f"is set without {allowlist.BOOTSTRAP}, so vLLM does not load the suite")


def _role() -> Check:
    try:
        return Check("role", "ok", role())
    except ValueError as error:
        return Check("role", "fail", str(error))


def _machine() -> Check:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return Check("machine", "ok", f"{device_name()}; {cores} cores, {memory:.0f} GiB; {platform.platform()}")


def _ports(ports: Iterable[int]) -> list[Check]:
    side = int(os.environ.get("VLLM_NIXL_SIDE_CHANNEL_PORT") or DEFAULT_SIDE_CHANNEL_PORT)
    checks = [_port(port, "fail") for port in ports]
    return [*checks, _port(side, "warn", " (NIXL side channel; each instance needs its own)")]


def _port(port: int, status: Status, note: str = "") -> Check:
    with socket.socket() as probe_socket:
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that just ended are no use
        try:
            probe_socket.bind(("", port))
        except OSError as error:
            return Check(f"port {port}", status, f"{error.strerror or error}{note}")
    return Check(f"port {port}", "ok", f"free{note}")


def _vllm_platform(answer: dict[str, Any] | None) -> Check:
    if answer is None:
        return Check("vllm platform", "warn", "vLLM is not installed")
    if "error" in answer:
        return Check("vllm platform", "fail", str(answer["error"]))
    if not answer["platform"]:
        return Check("vllm platform", "fail", "vLLM recognizes no device here")
    return Check("vllm platform", "ok", f"{answer['platform']}; torch {answer['torch']}, {answer['gpus']} GPUs")


def _nixl(answer: dict[str, Any] | None) -> Check:
    if answer is None:
        return Check("nixl", "warn", "not installed")
    if "error" in answer:
        return Check("nixl", "warn", f"{installed('nixl')}, but no UCX agent can be made: {answer['error']}")
    others = ", ".join(name for name in answer["plugins"] if name != "UCX")
    return Check("nixl", "ok", f"{installed('nixl')}; UCX agent on {', '.join(answer['ucx_memory'])}; also: {others}")


# Checks that must be ok before a plugin can run inside vLLM.
_NEEDED = ("python", "vllm", "vllm contracts", "entry point", "VLLM_PLUGINS", "role", "vllm platform")
_NEEDED_BY = {"disagg": ("nixl",), "epd": ("nixl",)}


def _verdict(
    plugin: PluginInfo, requested: bool, checks: Iterable[Check], answers: dict[str, dict[str, Any]]
) -> Verdict:
    if not plugin.landed:
        return Verdict(plugin.name, requested, False, ("not landed in this release",))
    needed = (*_NEEDED, *_NEEDED_BY.get(plugin.name, ()))
    reasons = [f"{check.name}: {check.detail}" for check in checks if check.name in needed and check.status != "ok"]
    if importlib.util.find_spec(plugin.package) is None:
        reasons.append(f"package {plugin.package} is not installed")
    broken = answers.get("vllm", {}).get("broken", {}).get(plugin.name)
    if broken:
        reasons.append(broken)
    parts = answers.get("vllm", {}).get("parts", {}).get(plugin.name, {})
    return Verdict(plugin.name, requested, not reasons, tuple(reasons), parts)
