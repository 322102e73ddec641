"""The commands of docs/swiftkv.md, run as they stand: convert, distil, serve."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
from harness import prompt, run_of_ports
from reference_swiftkv import load

PAGE = Path(__file__).resolve().parents[2] / "docs" / "swiftkv.md"
# What a tiny model on two cores needs, beside the documented command.
SMALL = "--dtype float32 --enforce-eager --max-model-len 1024 --kv-cache-memory-bytes 64000000 --block-size 32"
START_S = 180.0


def documented() -> list[str]:
    block = re.search(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None
    lines = block[1].strip().splitlines()
    assert [line.split()[:3] for line in lines[:2]] == [["vllm-suite", "swiftkv", v] for v in ("convert", "distill")]
    assert lines[2].startswith("vllm serve")
    assert len(lines) == 3
    return lines


def test_convert_distill_serve(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    texts = [line for line in Path(json.__file__).read_text().splitlines() if len(line) > 30]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:200]))
    places = {"MODEL": str(model), "DATA": str(data), "OUT": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:"}
    env = os.environ | places | {"PATH": places["PATH"] + os.environ["PATH"], "HF_HUB_OFFLINE": "1"}
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # as `vllm-suite up` has it on a CPU: ready ten seconds earlier
    convert, distill, serve = documented()
    for line in (convert, distill):
        done = subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    port = run_of_ports(1)
    log = (tmp_path / "serve.log").open("wb")
    command = f"exec {serve} --port {port} --served-model-name tiny {SMALL}"
    server = subprocess.Popen(["bash", "-c", command], env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        asyncio.run(answers(server, tmp_path, f"http://127.0.0.1:{port}"))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        log.close()


async def answers(server: subprocess.Popen[bytes], folder: Path, url: str) -> None:
    """The server gives the reference's tokens and counts what it skipped."""
    text = prompt(200, 3)
    body: dict[str, Any] = {"model": "tiny", "prompt": text, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    async with aiohttp.ClientSession() as session, asyncio.timeout(START_S):
        while True:
            assert server.poll() is None, (folder / "serve.log").read_text()[-3000:]
            try:
                async with session.get(f"{url}/health") as response:
                    if response.status == 200:
                        break
            except aiohttp.ClientError:
                await asyncio.sleep(0.2)
        async with session.post(f"{url}/v1/completions", json=body | {"return_token_ids": True}) as response:
            assert response.status == 200, await response.text()
            got = (await response.json())["choices"][0]["token_ids"]
        assert got == load(folder / "swiftkv").greedy(text, 8)
        skipped = 0.0
        while skipped < len(text) - 1:  # the exporter reads the workers once in a while
            async with session.get(f"{url}/metrics") as response:
                found = re.search(r"^vllm_suite_swiftkv_skipped_tokens_total{.*} (\S+)$", await response.text(), re.M)
            skipped = float(found[1]) if found else 0.0
            await asyncio.sleep(0.1)
        assert skipped == len(text) - 1
