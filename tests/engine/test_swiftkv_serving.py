"""Two real servers with a SwiftKV model: one that answers clients, and a prefill-only one that hands over to it.

What each counted is compared with what was asked of it, to the token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prometheus
import pytest
from child import free_port
from reference_swiftkv import Reference, load
from served import Server, start, until

from vllm_suite.observability.capabilities import SWIFTKV

BUDGET = 128
PREFIX = "vllm_suite_swiftkv_"
HAND_OFF = {"do_remote_decode": True, "do_remote_prefill": False}


@dataclass
class Fleet:
    """``d`` answers clients, ``p`` computes prompts for it; ``reference`` is the model in plain torch."""

    d: Server
    p: Server
    reference: Reference


@pytest.fixture(scope="module")
def fleet(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    model, work = checkpoint("qwen3", layers=6, cut=3), tmp_path_factory.mktemp("serve")

    def one(name: str, role: str, *words: str, **more: str) -> Any:
        port = free_port()
        env = {
            "VLLM_SUITE_ROLE": role,
            "VLLM_SUITE_INSTANCE_ID": name,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            **more,
        }
        common = [str(model), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
        common += ["--plugins", "disagg,swiftkv", "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
        common += ["--kv-cache-memory-bytes", "67108864", "--max-num-batched-tokens", str(BUDGET)]
        return start([*common, *words], port, work / f"{name}.log", env)

    only = '{"suite": {"swiftkv": {"prefill_only": true}}}'
    # One with its worker in a process of its own, one with it in the engine's, as `up` has it on a CPU.
    here = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with one("d", "decode") as d, one("p", "prefill", "--additional-config", only, **here) as p:
        d.wait_ready()
        p.wait_ready()
        until(lambda: "steps_total" in counters(d) and "steps_total" in counters(p))
        yield Fleet(d, p, load(model))


def tokens(count: int, seed: int) -> list[int]:
    rng = random.Random(f"{count}:{seed}")
    return [rng.randrange(16, 500) for _ in range(count)]


def complete(server: Server, prompt: list[int], count: int, **more: Any) -> list[int]:
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    status, answer = server.post("/v1/completions", model="tiny", **body | more)
    assert status == 200, answer
    found: list[int] = answer["choices"][0]["token_ids"]
    return found


def counters(server: Server) -> dict[str, float]:
    return {name.removeprefix(PREFIX): value for name, value in server.series(PREFIX).items()}


def test_answers_are_the_reference_and_metrics_are_exact(fleet: Fleet) -> None:
    before = counters(fleet.d)
    lengths, outputs = (1, 127, 128, 129, 300), 6
    for length in lengths:
        prompt = tokens(length, 1)
        assert complete(fleet.d, prompt, outputs) == fleet.reference.greedy(prompt, outputs)
    prompts = sum(lengths)
    decodes = len(lengths) * (outputs - 1)
    chunks = sum(-(-length // BUDGET) for length in lengths)
    wanted = {
        "prompt_tokens_total": prompts,
        "head_tokens_total": prompts + decodes,
        "tail_rows_total": chunks + decodes,
        "skipped_tokens_total": prompts - chunks,
        "steps_total": chunks + decodes,
    }
    until(lambda: counters(fleet.d)["steps_total"] >= before["steps_total"] + wanted["steps_total"])
    after = counters(fleet.d)
    assert {name: after[name] - before[name] for name in wanted} == wanted
    assert after["skip_ratio"] == pytest.approx(after["skipped_tokens_total"] / after["head_tokens_total"])
    assert after["armed"] == 1
    assert after["poll_failures_total"] == 0


def test_a_prefill_only_instance_skips_everything(fleet: Fleet) -> None:
    begun = counters(fleet.p)
    complete(fleet.p, tokens(200, 2), 1, kv_transfer_params=HAND_OFF)
    until(lambda: counters(fleet.p)["steps_total"] > begun["steps_total"] + 1)
    after = counters(fleet.p)
    grown = {name: after[name] - begun[name] for name in begun if name.endswith("_total")}
    # A prefill-only instance has no tail, and the token that it answers is not computed.
    assert grown == {
        **{"prompt_tokens_total": 200, "head_tokens_total": 200, "tail_rows_total": 0, "skipped_tokens_total": 200},
        "steps_total": 2,
        "poll_failures_total": 0,
    }


def test_a_hand_off_decodes_to_the_reference(fleet: Fleet) -> None:
    prompt = tokens(333, 3)
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "kv_transfer_params": HAND_OFF}
    status, answer = fleet.p.post("/v1/completions", **body)
    assert status == 200, answer
    pulls = "vllm_suite_kv_pulls_total"
    before = fleet.d.series(pulls).get(pulls, 0)
    found = complete(fleet.d, prompt, 6, kv_transfer_params=answer["kv_transfer_params"])
    assert found == fleet.reference.greedy(prompt, 6)
    assert fleet.d.series(pulls)[pulls] == before + 1


CHAT = {"messages": [{"role": "user", "content": "hello"}]}
TEXT = {"prompt": [20, 30, 40]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", TEXT | {"max_tokens": 5}),
        ("completions", TEXT | {"max_tokens": 1}),
        ("completions", TEXT | {"max_tokens": 5, "kv_transfer_params": HAND_OFF}),
        ("completions", TEXT | {"max_tokens": 1, "kv_transfer_params": HAND_OFF, "n": 2}),
        ("completions", TEXT | {"max_tokens": 1, "kv_transfer_params": HAND_OFF, "logprobs": 1}),
        ("completions", TEXT | {"max_tokens": 1, "kv_transfer_params": HAND_OFF, "prompt_logprobs": 0}),
        ("completions", TEXT | {"max_tokens": 1, "kv_transfer_params": HAND_OFF, "use_beam_search": True, "n": 2}),
        ("chat/completions", CHAT | {"max_tokens": 5}),
        ("responses", {"input": "hello"}),
    ],
)
def test_a_prefill_only_instance_never_answers_a_client(fleet: Fleet, path: str, body: dict[str, Any]) -> None:
    status, answer = fleet.p.post(f"/v1/{path}", model="tiny", **body)
    assert status == 400, answer
    assert "send requests to a decode instance or to the router" in answer["error"]["message"]


def test_nor_does_it_stream_to_one(fleet: Fleet) -> None:
    _, text = fleet.p.post("/v1/completions", model="tiny", **TEXT, max_tokens=5, stream=True)
    assert "send requests to a decode instance" in text
    assert "choices" not in text


@pytest.mark.parametrize("body", [{"prompt_logprobs": 0}, {"prompt_logprobs": 2}, {"echo": True, "logprobs": 0}])
def test_prompt_logprobs_are_refused_and_the_engine_lives(fleet: Fleet, body: dict[str, Any]) -> None:
    status, answer = fleet.d.post("/v1/completions", model="tiny", **TEXT, max_tokens=2, **body)
    assert status == 400, answer
    assert "--kv-sharing-fast-prefill" in answer["error"]["message"]
    assert len(complete(fleet.d, tokens(5, 4), 2)) == 2


def test_the_state_tells_a_router(fleet: Fleet) -> None:
    p, d = fleet.p.state(), fleet.d.state()
    assert (p["role"], p["prefill_only"], p["plugins"]) == ("prefill", True, ["disagg", "swiftkv"])
    assert (d["role"], d["prefill_only"]) == ("decode", False)


def test_one_line_says_what_was_set(fleet: Fleet) -> None:
    [line] = [text for text in fleet.p.log.read_text().splitlines() if "set --kv-sharing-fast-prefill True" in text]
    assert "set --logits-processors vllm_swiftkv.prefill_guard:PrefillGuard" in line
    assert "set --worker-extension-cls vllm_swiftkv.worker.SwiftKVWorkerExtension" in line


def test_the_dashboard_has_data(fleet: Fleet, tmp_path: Path) -> None:
    jobs = [prometheus.job("instances", f"127.0.0.1:{fleet.d.port}", f"127.0.0.1:{fleet.p.port}")]
    with prometheus.running(tmp_path, free_port(), jobs) as server:
        server.until(server.targets_up, "a good scrape of every target")
        complete(fleet.d, tokens(50, 9), 2)
        server.until_filled(SWIFTKV)
