"""`vllm-suite router` as a process: arguments, listening line, drain, exit status."""

from __future__ import annotations

import asyncio
import signal
import sys

import aiohttp
import pytest
import yaml
from pydantic import ValidationError
from scripted import free_port

from vllm_suite.router.config import RouterConfig

BODY = {"model": "tiny", "prompt": "hello", "stream": True}
COMMAND = [sys.executable, "-m", "vllm_suite.cli.main", "router"]


async def run(*args):
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *args, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(20):
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
        async with asyncio.timeout(20):
            line = (await process.stdout.readline()).decode()
        assert line.startswith("vllm-suite router listening on http://127.0.0.1:")
        return process, line.split()[-1]

    yield make
    for process in started:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def ready(client, url):
    async with asyncio.timeout(10):
        while True:
            async with client.get(url + "/ready") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("seconds", [5.0, 0.2])
async def test_drain_on_sigterm(instance, start, tmp_path, seconds):
    """Running requests end well and the exit is 0; those that take longer than the drain are cut off, and it is 1."""
    d = await instance("any", events=20)  # 1 s a stream
    d.script.append("trickle")
    file = tmp_path / "router.yaml"
    settings = {"membership": {"static": [{"url": d.url}]}, "timeouts": {"drain_s": seconds}}
    file.write_text(yaml.safe_dump(settings))
    process, url = await start("--config", str(file))
    async with aiohttp.ClientSession() as client:
        await ready(client, url)
        async with client.post(url + "/v1/completions", json=BODY) as running:
            await running.content.readany()
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.1)
            async with client.get(url + "/ready") as response:
                assert response.status == 503
            async with client.get(url + "/health") as response:
                assert response.status == 200
            async with client.post(url + "/v1/completions", json=BODY) as response:
                assert response.status == 503
                assert response.headers["Retry-After"] == "1"
                assert (await response.json())["error"]["code"] == 503
            if seconds == 5.0:
                assert (await running.read()).endswith(b"data: [DONE]\n\n")
            else:
                with pytest.raises(aiohttp.ClientError):
                    await running.read()
    async with asyncio.timeout(5):
        assert await process.wait() == (0 if seconds == 5.0 else 1)
    assert len(d.seen) == 1


async def test_second_signal_does_not_wait(instance, start):
    d = await instance("any")
    d.script.append("hang")
    process, url = await start("--any", d.url)
    async with aiohttp.ClientSession() as client:
        await ready(client, url)
        task = asyncio.create_task(client.post(url + "/v1/completions", json=BODY))
        await asyncio.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        assert process.returncode is None
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(5):
            assert await process.wait() == 1
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
