"""`vllm bench serve` beside the clients of a soak: load of another kind, from another program."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

_RATE = 1.0
_GRACE_S = 120.0
_START_S = 20.0
_KEPT = (
    "completed", "failed", "request_throughput", "output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms",
    "p99_tpot_ms",
)  # fmt: skip


class Bench:
    """One run of it, about as long as the soak.

    Its prompts are of one length: on CPU a plain vLLM's memory grows for thousands of new prompts of many lengths.
    """

    def __init__(self, folder: Path, model: Path, seed: int) -> None:
        self._folder = folder
        self._model = model
        self._seed = seed

    async def run(self, url: str, key: str, seconds: float) -> dict[str, Any]:
        """Its figures; `ended` is False where it had to be killed because some request of it had no end."""
        count = max(4, int(_RATE * (seconds - _START_S)))
        program = Path(sys.executable).with_name("vllm")
        command = [
            str(program), "bench", "serve", "--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions",
            "--model", "tiny", "--tokenizer", str(self._model), "--dataset-name", "random", "--random-input-len", "300",
            "--random-output-len", "24", "--random-range-ratio", "0.0", "--request-rate", str(_RATE),
            "--max-concurrency", "4", "--num-prompts", str(count), "--seed", str(self._seed), "--ignore-eos",
            "--disable-tqdm", "--save-result", "--result-dir", str(self._folder), "--result-filename", "bench.json",
            "--ready-check-timeout-sec", "60",
        ]  # fmt: skip
        environment = os.environ | {"OPENAI_API_KEY": key, "HF_HUB_OFFLINE": "1"}
        log = (self._folder / "bench.log").open("wb")
        process = await asyncio.create_subprocess_exec(
            *command, env=environment, stdout=log, stderr=asyncio.subprocess.STDOUT
        )
        ended = True
        try:
            await asyncio.wait_for(process.wait(), seconds + _GRACE_S)
        except TimeoutError:
            ended = False
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            log.close()
        found = {"asked": count, "ended": ended, "status": process.returncode}
        return found | self._result()

    def _result(self) -> dict[str, Any]:
        try:
            figures = json.loads((self._folder / "bench.json").read_text())
        except (OSError, ValueError):
            return {"figures": None}
        return {"figures": {name: figures[name] for name in _KEPT if name in figures}}
