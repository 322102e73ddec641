"""A real Prometheus for tests: where its programs are, and a server that scrapes what a test runs."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_suite.fleet.demo_spec import free_ports
from vllm_suite.observability.grafana import Dashboard, expressions

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 60.0


def program(name: str) -> str:
    """Path of `prometheus` or `promtool`; skips the test where there is none.

    Looks into the folder that VLLM_SUITE_PROMETHEUS names, PATH, and where `make setup` unpacks Debian's package.
    """
    given = os.environ.get("VLLM_SUITE_PROMETHEUS")
    folders = [given] if given else [os.environ.get("PATH", ""), str(ROOT / ".venv/opt/prometheus/usr/bin")]
    for folder in folders:
        found = shutil.which(name, path=folder)
        if found:
            return found
    pytest.skip(f"no {name}; install Debian's package prometheus, or set VLLM_SUITE_PROMETHEUS to a folder with it")


def available() -> bool:
    """Whether there is a Prometheus, for tests that are about more than it."""
    try:
        return bool(program("prometheus"))
    except pytest.skip.Exception:
        return False


def promtool(*arguments: str, stdin: str | None = None) -> str:
    """Run it and return its output; fails the test with that where the exit status is not 0."""
    command = [program("promtool"), *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


class Prometheus:
    """A running server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def api(self, path: str, **query: str) -> Any:
        """`data` of an answer of its HTTP API; fails the test on an error."""
        text = urllib.parse.urlencode(query)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{text}", timeout=20) as answer:
                body = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {query}: {error.read().decode(errors='replace')}") from None
        assert body["status"] == "success", body
        return body["data"]

    def query(self, expr: str) -> list[dict[str, Any]]:
        """An instant vector, now."""
        found = self.api("query", query=expr)
        assert found["resultType"] == "vector", (expr, found["resultType"])
        result: list[dict[str, Any]] = found["result"]
        return result

    def number(self, expr: str) -> float:
        """Value of the only sample of an instant vector; 0 where there is none."""
        found = self.query(expr)
        assert len(found) < 2, (expr, found)
        return float(found[0]["value"][1]) if found else 0.0

    def blank(self, dashboard: Dashboard, but: Collection[str] = (), interval: str = "5m") -> list[str]:
        """Expressions of a dashboard that give no series, or no number in any, but those with a series of `but`."""
        asked = expressions(dashboard, 'fleet=~".*",namespace=~".*"', interval)
        for name in but:
            assert any(name in expr for expr in asked), f"{dashboard.name} asks for no {name}"
        return [
            expr
            for expr in asked
            if not any(name in expr for name in but)
            and all(math.isnan(float(row["value"][1])) for row in self.query(expr))
        ]

    def until_filled(self, dashboard: Dashboard, but: Collection[str] = (), timeout_s: float = 30.0) -> None:
        """Wait until every expression of a dashboard gives a number; fails the test with those that do not."""
        deadline = time.monotonic() + timeout_s
        while missing := self.blank(dashboard, but):
            assert time.monotonic() < deadline, f"{dashboard.name} has no data for {missing}"
            time.sleep(0.5)

    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        alerts = self.api("alerts")["alerts"]
        return {one["labels"]["alertname"] for one in alerts if one["state"] == "firing"}

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        """Wait for a condition; fails the test when it does not come."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come within {timeout_s:g} s"
            time.sleep(0.25)

    def targets_up(self) -> bool:
        """Every target was scraped, and the last scrape of each went well."""
        targets = self.api("targets")["activeTargets"]
        return bool(targets) and all(one["health"] == "up" for one in targets)


def job(name: str, *urls: str, **more: Any) -> dict[str, Any]:
    """One of scrape_configs."""
    return {"job_name": name, "static_configs": [{"targets": [url.split("://")[-1] for url in urls]}], **more}


def free_port() -> int:
    """A port that nothing listens on now, and that the system hands to nobody before it is used."""
    return free_ports(1)


@contextlib.contextmanager
def running(
    folder: Path, port: int, jobs: list[dict[str, Any]], rules: dict[str, Any] | None = None, interval: str = "1s"
) -> Iterator[Prometheus]:
    """Start a server on loopback that scrapes `jobs` (scrape_configs) and evaluates `rules`, every `interval`."""
    binary = program("prometheus")
    config: dict[str, Any] = {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "scrape_configs": jobs,
    }
    if rules is not None:
        (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
        config["rule_files"] = [str(folder / "rules.yaml")]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    promtool("check", "config", str(folder / "prometheus.yaml"))
    log_path = folder / "prometheus.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
            stdout=log,
            stderr=log,
            env={"PATH": os.environ.get("PATH", ""), "GOMAXPROCS": "1"},
        )
    try:
        server = Prometheus(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            assert process.poll() is None, log_path.read_text()[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}/-/ready", timeout=5):
                break
            assert time.monotonic() < deadline, log_path.read_text()[-3000:]
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(15)
