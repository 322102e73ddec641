"""Tensor parallelism: KV heads are split over the ranks, or each given to several where there are fewer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from child import ENGINE_ENV
from reference_swiftkv import load
from swiftkv_checkpoints import make_swiftkv_checkpoint
from swiftkv_engine import tokens

LENGTHS = (5, 33, 150, 400)
NEW = 8

# In a process of its own: with several workers vLLM starts processes, and a forked engine may not.
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model, prompts, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=1024, max_num_batched_tokens=128,
              max_num_seqs=8, kv_cache_memory_bytes=64 << 20, block_size=32, tensor_parallel_size=2,
              distributed_executor_backend="mp")
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    counted = llm.collective_rpc("swiftkv_counters")
    json.dump({"tokens": [list(o.outputs[0].token_ids) for o in outputs], "counted": counted}, open(out, "w"))
"""


@pytest.mark.parametrize(
    ("family", "kv_heads", "group"), [("llama", 1, 2), pytest.param("qwen2", 2, 1, marks=pytest.mark.slow)]
)
def test_two_ranks_answer_as_the_reference(tmp_path: Path, family: str, kv_heads: int, group: int) -> None:
    model = make_swiftkv_checkpoint(
        tmp_path / "m", family, layers=8, cut=4, group=group, num_key_value_heads=kv_heads, num_attention_heads=4
    )
    reference = load(model)
    prompts = [list(tokens(length)) for length in LENGTHS]
    program, out, log = tmp_path / "program.py", tmp_path / "out.json", tmp_path / "log"
    program.write_text(PROGRAM)
    env = os.environ | ENGINE_ENV | {"VLLM_SUITE_PLUGINS": "swiftkv", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("wb") as stream:
        command = [sys.executable, str(program), str(model), json.dumps(prompts), str(out)]
        subprocess.run(command, env=env, stdout=stream, stderr=subprocess.STDOUT, timeout=200, check=False)
    assert out.exists(), log.read_text()[-4000:]
    found = json.loads(out.read_text())
    assert found["tokens"] == [reference.greedy(prompt, NEW) for prompt in prompts]
    ranks = found["counted"]
    assert len(ranks) == 2
    assert ranks[0]["tail_rows"] == ranks[1]["tail_rows"] < sum(LENGTHS)
