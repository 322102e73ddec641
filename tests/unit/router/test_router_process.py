"""`vllm-suite router` as a process: arguments, listening line, drain, exit status."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import deque

import aiohttp
import pytest
import yaml
from pydantic import ValidationError
from scripted import free_port

from vllm_suite.router.config import RouterConfig

BODY = {"model": "tiny", "prompt": "hello", "stream": True}
LONGEST_S = 20.0  # a wait for what comes soon; hit only where it never comes
COMMAND = [sys.executable, "-m", "vllm_suite.cli.main", "router"]


async def run(*args):
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *args, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(LONGEST_S):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


@pytest.fixture
async def start():
    started = []

    async def make(*args):
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "--port", "0", *args, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        started.append(process)
        async with asyncio.timeout(LONGEST_S):
            line = (await process.stdout.readline()).decode()
        assert line.startswith("vllm-suite router listening on http://127.0.0.1:")
        return process, line.split()[-1]

    yield make
    for process in started:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def status_of(client, url, wanted):
    """Wait until the router says so of itself: 200 ready, 503 draining."""
    async with asyncio.timeout(LONGEST_S):
        while True:
            async with client.get(url + "/ready") as response:
                if response.status == wanted:
                    return
            await asyncio.sleep(0.05)


async def exit_of(process):
    async with asyncio.timeout(LONGEST_S):
        return await process.wait()


@pytest.fixture
async def router(start, tmp_path):
    """A router with a drain of so many seconds."""

    async def make(url, drain_s):
        file = tmp_path / "router.yaml"
        file.write_text(yaml.safe_dump({"membership": {"static": [{"url": url}]}, "timeouts": {"drain_s": drain_s}}))
        return await start("--config", str(file))

    return make


async def test_drain_on_sigterm(instance, router):
    """Running requests end well, new ones are refused, and the exit is 0. The stream ends when the test has looked."""
    d = await instance("any", script=deque(["wait"]))
    process, url = await router(d.url, 10 * LONGEST_S)
    async with aiohttp.ClientSession() as client:
        await status_of(client, url, 200)
        async with client.post(url + "/v1/completions", json=BODY) as running:
            await running.content.readany()
            process.send_signal(signal.SIGTERM)
            await status_of(client, url, 503)
            async with client.get(url + "/health") as response:
                assert response.status == 200
            async with client.post(url + "/v1/completions", json=BODY) as response:
                assert response.status == 503
                assert response.headers["Retry-After"] == "1"
                assert (await response.json())["error"]["code"] == 503
            assert process.returncode is None
            d.go_on.set()
            async with asyncio.timeout(LONGEST_S):
                assert (await running.read()).endswith(b"data: [DONE]\n\n")
    assert await exit_of(process) == 0
    assert len(d.seen) == 1


async def test_drain_cuts_off_what_takes_longer(instance, router):
    """A stream that does not end is cut off after `drain_s`, and the exit is 1."""
    d = await instance("any", script=deque(["wait"]))
    process, url = await router(d.url, 0.2)
    async with aiohttp.ClientSession() as client:
        await status_of(client, url, 200)
        async with client.post(url + "/v1/completions", json=BODY) as running:
            await running.content.readany()
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(LONGEST_S):
                with pytest.raises(aiohttp.ClientError):
                    await running.read()
    assert await exit_of(process) == 1
    assert len(d.seen) == 1


async def test_second_signal_does_not_wait(instance, start):
    d = await instance("any", hold=asyncio.Event())
    process, url = await start("--any", d.url)
    async with aiohttp.ClientSession() as client:
        await status_of(client, url, 200)
        task = asyncio.create_task(client.post(url + "/v1/completions", json=BODY))
        async with asyncio.timeout(LONGEST_S):
            while not d.seen:
                await asyncio.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        await status_of(client, url, 503)
        assert process.returncode is None
        process.send_signal(signal.SIGTERM)
        assert await exit_of(process) == 1
        with pytest.raises(aiohttp.ClientError):
            await task


async def test_bad_arguments_exit_2(tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("membership:\n  statik: []\n")
    no_mapping = tmp_path / "list.yaml"
    no_mapping.write_text("- 1\n")
    empty = tmp_path / "keys"
    empty.write_text("\n")
    no_key = tmp_path / "nokey.yaml"
    no_key.write_text(f"auth:\n  api_key_file: {empty}\n")
    attempts = await asyncio.gather(
        run(),
        run("--config", str(tmp_path / "none.yaml")),
        run("--config", str(wrong)),
        run("--config", str(no_mapping)),
        run("--config", str(no_key), "--any", "http://h:1"),
        run("--any", "no-url"),
        run("--any", "http://h:1", "http://h:1"),
        run("--decode-policy", "nearest", "--any", "http://h:1"),
    )
    for code, out, err in attempts:
        assert code == 2
        assert out == ""
        assert err
        assert "Traceback" not in err


async def test_taken_port_exits_1(instance):
    d = await instance("any")
    code, _, err = await run("--any", d.url, "--port", str(d.port))
    assert code == 1
    assert "cannot listen" in err
    assert "Traceback" not in err


async def test_check_prints_settings_without_keys(tmp_path):
    file = tmp_path / "router.yaml"
    file.write_text("auth: {api_keys: [hidden-key]}\ntimeouts: {prefill_s: 7}\n")
    code, out, _ = await run(
        "--config", str(file), "--prefill", "http://p:1", "http://p:2/", "--decode", "http://d:1",
        "--prefill-policy", "round_robin", "--min-prompt-tokens", "9", "--port", str(free_port()), "--check",
    )  # fmt: skip
    assert code == 0
    settings = yaml.safe_load(out)
    assert settings["membership"]["static"] == [
        {"url": "http://p:1", "role": "prefill"},
        {"url": "http://p:2", "role": "prefill"},
        {"url": "http://d:1", "role": "decode"},
    ]
    assert settings["policies"]["prefill"] == "round_robin"
    assert settings["disaggregation"]["min_prompt_tokens"] == 9
    assert settings["timeouts"]["prefill_s"] == 7
    assert "hidden-key" not in out
    assert RouterConfig.model_validate(settings).port == settings["port"]


def test_settings_are_strict():
    with pytest.raises(ValidationError):
        RouterConfig.model_validate({"limits": {"body_byte": 3}})
    with pytest.raises(ValidationError) as caught:
        RouterConfig.model_validate({"auth": {"upstream_api_key": {"nested": "very-secret"}}})
    assert "very-secret" not in str(caught.value)
    with pytest.raises(ValidationError):
        RouterConfig().port = 1
