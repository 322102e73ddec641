"""A consumer of two tensor-parallel ranks: each fetches every item for itself, and one failure is both ranks'."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from child import ENGINE_ENV
from epd_engine import MANAGER, Spec, engines, references, without_media
from epd_stage import SUITE, question

from vllm_suite.fleet.pictures_parts import image_part
from vllm_suite.fleet.tiny_media import write

# In a process of its own: with several workers vLLM starts processes, and a forked engine may not.
PROGRAM = """
import json, sys
from prometheus_client import REGISTRY
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model, asks, options, out = sys.argv[1], json.load(open(sys.argv[2])), json.loads(sys.argv[3]), sys.argv[4]
    llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=8, block_size=32,
              kv_cache_memory_bytes=64 << 20, tensor_parallel_size=2, distributed_executor_backend="mp",
              disable_log_stats=False, enable_prefix_caching=False, **options)
    said = []
    for parts, ec in asks:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, extra_args={"ec_transfer_params": ec})
        (output,) = llm.chat([{"role": "user", "content": parts}], params, use_tqdm=False)
        said.append([output.outputs[0].finish_reason, list(output.outputs[0].token_ids)])
    counters = {}
    for sample in (sample for family in REGISTRY.collect() for sample in family.samples):
        if sample.name.startswith("vllm_suite_ec_") and sample.name.endswith("_total"):
            label = next((v for k, v in sample.labels.items() if k not in ("model_name", "engine")), "")
            counters[f"{sample.name[14:-6]} {label}".strip()] = sample.value
    json.dump({"said": said, "counters": counters}, open(out, "w"))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("qwen2_5_vl", tmp_path_factory.mktemp("media") / "qwen2_5_vl")


def run(tmp_path: Path, model: Path, asks: list[tuple[Any, Any]]) -> dict[str, Any]:
    program, given, out, log = (tmp_path / name for name in ("program.py", "asks.json", "out.json", "log"))
    program.write_text(PROGRAM)
    given.write_text(json.dumps(asks))
    options = {
        "ec_transfer_config": {
            "ec_connector": "SuiteECConnector",
            "ec_connector_module_path": "vllm_epd.connector",
            "ec_role": "ec_consumer",
            "ec_connector_extra_config": {"suite": SUITE},
        },
        "ec_manager_config": {"encoder_cache_manager_cls": MANAGER},
    }
    env = os.environ | ENGINE_ENV | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("wb") as stream:
        command = [sys.executable, str(program), str(model), str(given), json.dumps(options), str(out)]
        subprocess.run(command, env=env, stdout=stream, stderr=subprocess.STDOUT, timeout=200, check=False)
    assert out.exists(), log.read_text()[-4000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_two_ranks(tmp_path: Path, model: Path) -> None:
    with engines(Spec("e", model, "e", suite=SUITE)) as (e,):
        item = image_part(112, 112, 5, uuid="s-item")
        bad = image_part(112, 112, 5, uuid="s-bad")
        ec = references(e.encode([item, bad]))
        ec["s-bad"]["suite"]["epoch"] = "0" * 16
        (name,) = without_media("qwen2_5_vl", [item], {"s-item": {"metadata": {"image_grid_thw": [1, 8, 8]}}})
        found = run(
            tmp_path,
            model,
            [
                (question(image_part(112, 112, 5, uuid="s-local")), None),
                (question(name), ec),
                (question(bad), ec),
                (question({**name, "uuid": "s-unknown"}), None),
                (question(image_part(112, 112, 5, uuid="s-again")), None),
            ],
        )
    local, fetched, refused, unknown, again = found["said"]
    assert local[1]
    assert local == fetched == refused == again
    assert unknown[0] == "error"
    counters = found["counters"]
    assert counters["fetches ok"] == 1
    assert counters["fetch_bytes e"] == 2 * 16 * 128 * 4  # one copy for each rank
    assert counters["loads"] == 1
    assert counters["refused stale_epoch"] == 1
    assert counters["local_encodes stale_epoch"] == 1
    assert counters["local_encodes no_reference"] == 2
    assert counters["failed_items no_reference"] == 1
