"""`vllm-suite doctor` on this machine: what it reports, and when it is not healthy."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_suite.catalog import PLUGINS
from vllm_suite.compat import diagnosis
from vllm_suite.compat.diagnosis import Check, Diagnosis, Verdict, probe

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or importlib.util.find_spec("nixl") is None,
    reason="vLLM and NIXL are not installed; run `make setup`",
)


def doctor(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    return subprocess.run(
        [sys.executable, "-m", "vllm_suite.cli.main", "doctor", *argv],
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@needs_vllm
def test_disagg_can_work_here_and_the_result_is_machine_readable(tmp_path: Path) -> None:
    done = doctor("--plugins", "disagg", "--deadline", "100", "--json", str(tmp_path / "out" / "d.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads((tmp_path / "out" / "d.json").read_text())
    assert result["ok"] is True
    assert result["requested"] == ["disagg"]
    checks = {check["name"]: check for check in result["checks"]}
    for name in ("python", "vllm", "vllm contracts", "entry point", "vllm platform", "nixl"):
        assert checks[name]["status"] == "ok", checks[name]
    assert "UCX" in checks["nixl"]["detail"]
    plugins = {plugin["plugin"]: plugin for plugin in result["plugins"]}
    assert list(plugins) == list(PLUGINS)
    assert plugins["disagg"]["usable"]
    assert plugins["dler"]["usable"], plugins["dler"]
    assert plugins["dler"]["parts"]["settings"].startswith("additional_config.suite.dler: rule=boost, ")
    assert plugins["dler"]["parts"]["gate"].startswith("off: ")
    assert plugins["epd"]["usable"], plugins["epd"]
    assert plugins["epd"]["parts"]["transfer"].startswith("NIXL ")
    assert all(plugins["epd"]["parts"][kind].startswith("on: ") for kind in ("images", "video", "audio"))
    assert plugins["swiftkv"]["usable"]
    assert plugins["swiftkv"]["parts"]["skip"].startswith("armed for every SwiftKV model")
    assert set(plugins["swiftkv"]["parts"]) == {"skip", "late_kv kernel", "prefill-only"}
    assert "plugin swiftkv: skip: armed" in done.stdout
    assert set(result["provenance"]["versions"]) == {"suite", "python", "vllm", "torch", "nixl"}
    assert "\x1b" not in done.stdout  # plain lines where nobody looks


def test_what_cannot_be_had_makes_the_exit_status_1() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        # A deadline that nothing meets: libraries that do not answer are reported, and waited for no longer.
        started = time.monotonic()
        done = doctor(
            "--plugins",
            "disagg,dler",
            "--port",
            str(port),
            "--deadline",
            "0.01",
            VLLM_PLUGINS="other",
            VLLM_SUITE_ROLE="x",
        )
        assert time.monotonic() - started < 30
    assert done.returncode == 1
    assert f"fail  port {port}: Address already in use" in done.stdout
    assert "fail  VLLM_PLUGINS: is set without vllm_suite" in done.stdout
    assert "fail  role: VLLM_SUITE_ROLE='x' is not a role" in done.stdout
    assert "fail  plugin dler: VLLM_PLUGINS: is set without" in done.stdout
    assert "fail  plugin disagg: " in done.stdout


def test_an_unknown_plugin_is_a_bad_argument() -> None:
    done = doctor("--plugins", "nope")
    assert done.returncode == 2
    assert "known plugins: disagg" in done.stderr


def test_a_probe_that_fails_or_hangs_is_an_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "KeyError" in probe("no-such-probe", 30)["error"]
    hangs = tmp_path / "python"
    hangs.write_text("#!/bin/sh\nexec sleep 60\n")
    hangs.chmod(0o755)
    monkeypatch.setattr(diagnosis.sys, "executable", str(hangs))
    started = time.monotonic()
    assert probe("vllm", 0.3) == {"error": "no answer within 0.3 s"}
    assert time.monotonic() - started < 5


def result(*checks: Check, usable: bool = True, requested: bool = True) -> Diagnosis:
    return Diagnosis(checks, (Verdict("disagg", requested, usable, ()),), {})


def test_healthy_means_no_failure_and_every_requested_plugin() -> None:
    ok, warn, fail = Check("a", "ok", ""), Check("b", "warn", ""), Check("c", "fail", "")
    assert result(ok, warn).ok
    assert not result(ok, fail).ok
    assert not result(ok, usable=False).ok
    assert result(ok, usable=False, requested=False).ok
