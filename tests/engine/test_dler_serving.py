"""``vllm serve --plugins dler``: what clients can ask of the scheduler, and what it says of itself at ``/metrics``."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import prometheus
import pytest
from child import free_port
from prometheus_client.parser import text_string_to_metric_families
from served import Server, start, until

from vllm_suite.observability.capabilities import DLER

PREFIX = "vllm_suite_sched_"
SETTINGS = '{"suite": {"dler": {"rule": "kappa", "kappa": 2.5, "caps": {"capped": 7}}}}'


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    words = [str(model), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    words += ["--plugins", "dler", "--additional-config", SETTINGS, "--scheduling-policy", "priority"]
    words += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "2"]
    words += ["--kv-cache-memory-bytes", "67108864"]
    with start(words, port, tmp_path_factory.mktemp("serve") / "log", {"VLLM_SUITE_INSTANCE_ID": "s"}) as one:
        one.wait_ready()
        yield one


def tokens(count: int, seed: int) -> list[int]:
    rng = random.Random(f"{count}:{seed}")
    return [rng.randrange(16, 500) for _ in range(count)]


def complete(server: Server, prompt: list[int], **more: Any) -> list[dict[str, Any]]:
    body = {"prompt": prompt, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    status, answer = server.post("/v1/completions", model="tiny", **body | more)
    assert status == 200, answer
    choices: list[dict[str, Any]] = answer["choices"]
    return choices


def series(server: Server) -> dict[tuple[str, ...], float]:
    """Samples by name and the values of their own labels."""
    found = {}
    for family in text_string_to_metric_families(server.request("/metrics")[1]):
        for sample in family.samples:
            if sample.name.startswith(PREFIX) and not sample.name.endswith("_created"):
                own = tuple(v for k, v in sorted(sample.labels.items()) if k not in ("model_name", "engine"))
                found[sample.name.removeprefix(PREFIX), *own] = sample.value
    return found


def test_an_instance_says_that_it_orders_by_length(server: Server) -> None:
    assert server.state()["length_aware"] is True
    found = until(lambda: (all_ := series(server)) and ("kappa",) in all_ and all_)
    assert (found[("active",)], found[("kappa",)]) == (1, 2.5)
    assert "set --scheduler-cls vllm_suite.compat.scheduler.make_scheduler (dler, kappa 2.5 s/token)" in (
        server.log.read_text()
    )


def thrice(server: Server, seed: int) -> int:
    """Requests of class `chat` that end by themselves; the tokens of each."""
    prompt = tokens(40, seed)
    free = complete(server, prompt, max_tokens=12)[0]["token_ids"]
    last = next(n for n in range(5, 12) if free[n] not in free[:n])
    for _ in range(3):
        [choice] = complete(
            server, prompt, max_tokens=12, stop_token_ids=[free[last]], vllm_xargs={"dler_class": "chat"}
        )
        assert (choice["finish_reason"], choice["token_ids"]) == ("stop", free[: last + 1])
    return int(last)


def test_lengths_are_learned_and_counted_by_class(server: Server) -> None:
    last = thrice(server, 1)
    found = until(lambda: (all_ := series(server)).get(("requests_total", "chat", "stop")) == 3 and all_)
    assert found["output_tokens_total", "chat"] == 3 * (last + 1)
    assert found["latency_seconds_total", "chat"] > 0
    assert found["normalised_latency_seconds", "chat", "0.5"] > 0
    assert found["requests_total", "default", "length"] >= 1
    assert found["queue_length", "chat"] == found["queue_age_seconds", "chat"] == 0
    # By the third one something is known: a length was expected, and compared.
    assert ("length_error_tokens", "0.5") in found


def test_a_class_has_its_cap(server: Server) -> None:
    before = series(server).get(("caps_total", "capped"), 0)
    [choice] = complete(server, tokens(20, 2), max_tokens=30, vllm_xargs={"dler_class": "capped"})
    assert (choice["finish_reason"], len(choice["token_ids"])) == ("length", 7)
    [choice] = complete(server, tokens(20, 2), max_tokens=3, vllm_xargs={"dler_class": "capped"})
    assert (choice["finish_reason"], len(choice["token_ids"])) == ("length", 3)
    until(lambda: series(server).get(("caps_total", "capped")) == before + 1)


def test_k_of_n_samples(server: Server) -> None:
    """Places for two: one of the samples that the second to finish leaves behind has never begun."""
    before = series(server).get(("group_stops_total",), 0)
    ends = list(range(16, 80))  # each token ends an answer with one chance in eight
    sampled = {"temperature": 1.0, "seed": 7, "n": 5, "max_tokens": 200, "stop_token_ids": ends}
    all_ = complete(server, tokens(30, 3), **sampled)
    assert [choice["finish_reason"] for choice in all_] == ["stop"] * 5
    some = complete(server, tokens(30, 3), **sampled, vllm_xargs={"dler_stop_after": 2})
    stopped = [choice for choice in some if choice["finish_reason"] == "stop"]
    assert len(stopped) >= 2
    assert {choice["finish_reason"] for choice in some} == {"stop", "length"}
    for whole, part in zip(all_, some, strict=True):
        assert part["token_ids"] == whole["token_ids"][: len(part["token_ids"])]
    until(lambda: series(server).get(("group_stops_total",), 0) == before + 5 - len(stopped))


def test_short_ones_overtake_long_ones_that_wait(server: Server) -> None:
    """The clients' own clocks: two long requests run, others wait, and short ones come last."""
    long_ = {"max_tokens": 300, "stop_token_ids": [3], "vllm_xargs": {"dler_class": "long"}}
    short = {"max_tokens": 3, "vllm_xargs": {"dler_class": "chat"}}
    before = series(server).get(("overtakes_total",), 0)
    with ThreadPoolExecutor(32) as pool:
        futures = [pool.submit(complete, server, tokens(30, 50 + n), **long_) for n in range(24)]
        # What is seen is up to two seconds old, and some are to wait still when the short ones come.
        until(lambda: series(server).get(("queue_length", "long"), 0) >= 8, 60)
        futures += [pool.submit(complete, server, tokens(30, 90 + n), **short) for n in range(3)]
        assert all(future.result(120) for future in futures)
    until(lambda: series(server).get(("overtakes_total",), 0) > before)


def test_arguments_that_make_no_sense_are_counted(server: Server) -> None:
    before = series(server).get(("refused_arguments_total", "dler_stop_after"), 0)
    [choice] = complete(server, tokens(20, 4), max_tokens=2, vllm_xargs={"dler_stop_after": -1})
    assert len(choice["token_ids"]) == 2
    until(lambda: series(server).get(("refused_arguments_total", "dler_stop_after"), 0) == before + 1)


def test_the_dashboard_has_data(server: Server, tmp_path: Path) -> None:
    jobs = [prometheus.job("instances", f"127.0.0.1:{server.port}")]
    with prometheus.running(tmp_path, free_port(), jobs) as watching:
        watching.until(watching.targets_up, "a good scrape")
        thrice(server, 1)
        watching.until_filled(DLER)
