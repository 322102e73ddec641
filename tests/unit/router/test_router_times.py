"""What the router says of where requests' time went, of the targets they kept, and of what was promised."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from typing import Any

import pytest
from conftest import StartInstance, StartRouter
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from scripted import REFERENCE

from vllm_suite.fleet.predicted import PredictedSpec
from vllm_suite.router.bodies import prefill_queue_s
from vllm_suite.router.metrics import RouterMetrics
from vllm_suite.router.targets import Targets

BODY = {"model": "tiny", "prompt": "a prompt of more than eight tokens, as far as the router guesses", "stream": True}
NEVER, ALWAYS = "0.001us", "1h"


def verdicts(metrics: RouterMetrics) -> dict[str, int]:
    text = generate_latest(metrics.registry).decode()
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "vllm_suite_router_slo_requests_total":
                assert sample.labels["model"] in ("tiny", "other")
                found[sample.labels["verdict"]] += int(sample.value)
    return +found


@pytest.mark.parametrize(
    ("slo", "body", "verdict"),
    [
        ({"ttft": ALWAYS, "tpot": ALWAYS}, {}, "good"),
        ({"ttft": NEVER, "tpot": ALWAYS}, {}, "late"),
        ({"ttft": ALWAYS, "tpot": NEVER}, {}, "slow"),
        ({"tpot": ALWAYS}, {}, "good"),
        ({"ttft": ALWAYS}, {"n": 2}, "good"),
        ({"ttft": ALWAYS, "tpot": ALWAYS}, {"n": 2}, "unknown"),
        ({"ttft": ALWAYS, "tpot": ALWAYS}, {"stream": False}, "good"),
        ({"ttft": NEVER, "tpot": NEVER}, {"stream": False}, "late"),
        ({"ttft": ALWAYS}, {"stream": False}, "unknown"),
    ],
)
async def test_a_request_gets_one_verdict(
    instance: StartInstance, serve: StartRouter, slo: dict[str, str], body: dict[str, Any], verdict: str
) -> None:
    one = await instance(usage_event=True, completion_tokens=4)
    router = await serve([one], slo=slo)
    await router.post({**BODY, **body})
    await router.until(lambda: bool(verdicts(router.router.metrics)))
    assert verdicts(router.router.metrics) == {verdict: 1}


async def test_what_fails_is_not_good_and_the_clients_own_faults_do_not_count(
    instance: StartInstance, serve: StartRouter
) -> None:
    one = await instance(script=deque(["400", "500", "ok", "die"]))
    router = await serve(
        [one], slo={"ttft": ALWAYS}, recovery={"decode_retries": 0}, limits={"outstanding_requests": 1}
    )
    assert (await router.post(BODY))[0] == 400
    assert not verdicts(router.router.metrics)
    assert (await router.post(BODY))[0] == 500
    assert verdicts(router.router.metrics) == {"failed": 1}
    one.hold = asyncio.Event()
    first = asyncio.create_task(router.post(BODY))
    await router.until(lambda: router.router.live.requests_in_flight == 1)
    assert (await router.post(BODY))[0] == 429
    one.hold.set()
    await first
    await router.until(lambda: verdicts(router.router.metrics) == {"failed": 2, "good": 1})
    assert b"stopped in mid-stream" in (await router.post(BODY))[1]
    await router.until(lambda: verdicts(router.router.metrics) == {"failed": 3, "good": 1})


async def test_without_targets_nothing_is_judged(instance: StartInstance, serve: StartRouter) -> None:
    router = await serve([await instance()])
    await router.post(BODY)
    await router.until(lambda: router.value("ttft_seconds_count", model="tiny") == 1)
    assert not verdicts(router.router.metrics)


async def test_stages_add_up_to_the_request(instance: StartInstance, serve: StartRouter) -> None:
    prefill, decode = await instance("prefill"), await instance("decode", script=deque(["trickle"]))
    router = await serve([prefill, decode])
    await router.post(BODY)
    path = {"path": "disaggregated"}
    await router.until(lambda: router.value("request_seconds_count", **path) == 1)
    stages = ("queue", "prefill", "first_token", "decode")
    seconds = {stage: router.value("stage_seconds_sum", stage=stage, **path) for stage in stages}
    assert all(value > 0 for value in seconds.values()), seconds
    assert sum(seconds.values()) == pytest.approx(router.value("request_seconds_sum", **path), abs=1e-6)
    ttft = router.value("ttft_seconds_sum", model="tiny")
    assert ttft == pytest.approx(sum(seconds.values()) - seconds["decode"], abs=1e-6)
    assert router.value("tpot_seconds_count", model="tiny") == 1
    await router.post(
        {**BODY, "prompt": "another prompt of more than eight tokens, as far as is known", "stream": False}
    )
    await router.until(lambda: router.value("stage_seconds_count", stage="answer", **path) == 1)
    assert router.value("stage_seconds_count", stage="first_token", **path) == 1
    assert router.value("ttft_seconds_count", model="tiny") == 1


def test_what_prefill_says_of_its_queue() -> None:
    import json

    said = {**REFERENCE, "suite_times": {"queue_s": 0.25, "prefill_s": 0.5}}
    assert prefill_queue_s(json.dumps(said).encode()) == 0.25
    assert prefill_queue_s(json.dumps(REFERENCE).encode()) == 0.0
    assert prefill_queue_s(json.dumps({**REFERENCE, "suite_times": {"queue_s": "soon"}}).encode()) == 0.0


async def test_no_model_of_a_client_becomes_a_label(instance: StartInstance, serve: StartRouter) -> None:
    router = await serve([await instance(script=deque(["503", "503"]))], slo={"ttft": ALWAYS})
    await router.post({**BODY, "model": "a name that a client made up"})
    text = generate_latest(router.router.metrics.registry).decode()
    assert "made up" not in text
    assert verdicts(router.router.metrics) == {"failed": 1}


async def test_targets_and_predictions_are_exported(instance: StartInstance, serve: StartRouter) -> None:
    predicted = {
        "rate": 2.5,
        "error": 0.2,
        "source": "roofline",
        "ttft": {"p50": "123ms", "p99": "456ms", "p99_high": "789ms"},
        "tpot": {"p50": "11ms", "p99": "12ms"},
    }
    router = await serve([await instance()], slo={"ttft": "333ms"}, predicted=predicted)
    assert router.value("slo_ttft_seconds") == 0.333
    assert router.value("predicted_ttft_seconds", share="0.99", bound="high") == 0.789
    assert router.value("predicted_tpot_seconds", share="0.5", bound="middle") == 0.011
    assert router.value("predicted_requests_per_second") == 2.5
    await router.post(BODY)
    await router.until(lambda: router.value("ttft_seconds_count", model="tiny") == 1)
    # A bucket ends at each of them, so that the share below is exact.
    for bound in ("0.333", "0.123", "0.456", "0.789"):
        assert router.value("ttft_seconds_bucket", model="tiny", le=bound) in (0, 1)
        assert f'le="{bound}"' in generate_latest(router.router.metrics.registry).decode()
    targets = Targets(predicted=PredictedSpec.model_validate(predicted))
    assert targets.bounds_s("tpot") == [0.011, 0.012]
