"""More and fewer instances after switching: when, and how it is asked for at an emulated API server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import kmock
import pytest
from kube_emulator import ApiServer

from vllm_suite.kube.client import Kube
from vllm_suite.kube.verbs import verbs
from vllm_suite.planner.simulator.switching import Stage
from vllm_suite.roles.config import ScaleSpec
from vllm_suite.roles.follow import Foresee
from vllm_suite.roles.predict import Predictor
from vllm_suite.roles.scale import Scaling, Target, Workload
from vllm_suite.roles.seen import Seen
from vllm_suite.roles.traffic import Traffic

SPEC = ScaleSpec.model_validate({"gpus": 9, "least": 2, "up_after": 10, "down_after": 20})
DEPLOYMENT = "apps/v1/deployments"


def fleet(count: int, queue: int = 0, phase: str = "serving") -> list[Seen]:
    ready = phase == "serving"
    return [Seen(str(i), "", "e", "decode", 0, phase, ready, (), queue if i == 0 else 0, 1) for i in range(count)]


def steps(one: Scaling, looks: list[Seen], helps: bool, spare: bool, seconds: int = 25) -> list[int]:
    """The times at which it asks for something, with its sign."""
    return [now * step for now in range(1, seconds) if (step := one.step(looks, helps, spare, float(now)))]


@pytest.mark.parametrize(
    ("looks", "helps", "spare", "asked"),
    [
        (fleet(3, 9), False, False, [11, 22]),
        (fleet(3, 9), True, False, []),  # a switch comes first
        (fleet(3, 3), False, False, []),
        (fleet(4, 9), False, False, []),  # 9 GPUs are 4 instances of 2
        (fleet(3, 9, "closing"), False, False, []),
        (fleet(3), False, True, [-21]),
        (fleet(3), True, True, []),
        (fleet(3, 1), False, True, []),
        (fleet(2), False, True, []),
        (fleet(3), False, False, []),
    ],
)
def test_when(looks: list[Seen], helps: bool, spare: bool, asked: list[int]) -> None:
    assert steps(Scaling(SPEC, 2, 4), looks, helps, spare) == asked


def test_it_has_to_last() -> None:
    one = Scaling(SPEC, 1, 4)
    assert steps(one, fleet(3, 9), False, False, 9) == []
    assert one.step(fleet(3), False, False, 9.5) == 0
    assert one.step(fleet(3, 9), False, False, 10.0) == 0
    assert one.step(fleet(3, 9), False, False, 19.0) == 0
    assert one.step(fleet(3, 9), False, False, 20.0) == 1


def test_the_planner_says_whether_one_fewer_would_do() -> None:
    from test_roles_predict import fleet as predicted

    spec = predicted()
    assert spec.roles.predict is not None
    rule = Foresee(Predictor(spec), spec.roles.predict)
    stages = [Stage("prefill", 0, 0, 4), Stage("decode", 0, 0, 4)]
    for traffic, spare in ((Traffic(1.0, 1000, 100, 0, 4), True), (Traffic(35.0, 6000, 60, 0, 8), False)):
        rule._asked(traffic, stages, 0.0)
        assert rule.spare() is spare


@pytest.fixture
async def api() -> AsyncIterator[tuple[ApiServer, Kube]]:
    async with ApiServer() as api, kmock.Server(api) as server:
        api.resources[DEPLOYMENT] = {}
        api.objects[DEPLOYMENT, "prod", "llm-any"] = {"metadata": {"name": "llm-any"}, "spec": {"replicas": 3}}
        kube = Kube(str(server.url), "prod")
        yield api, kube
        await kube.close()


async def test_it_patches_the_scale(api: tuple[ApiServer, Kube]) -> None:
    server, kube = api
    one = Workload(kube, Target.parse("deployment/llm-any"))

    def replicas() -> Any:
        return server.objects[DEPLOYMENT, "prod", "llm-any"]["spec"]["replicas"]

    assert await one.add(1, 3, 2, 4) == "scaled"
    assert replicas() == 4
    # A pod is coming: the fleet that was seen is not what there will be.
    assert await one.add(1, 3, 2, 9) is None
    assert await one.add(-1, 3, 2, 9) is None
    # Not beyond the budget, whatever was asked for.
    assert await one.add(1, 4, 2, 4) is None
    assert await one.add(-1, 4, 4, 9) is None
    assert replicas() == 4
    assert await one.add(-1, 4, 2, 9) == "scaled"
    assert replicas() == 3
    assert server.asked() <= verbs("controller")


async def test_without_the_api_nothing_is_scaled() -> None:
    kube = Kube("http://127.0.0.1:9", "prod")
    assert await Workload(kube, Target.parse("lws/llm-any")).add(1, 3, 2, 4) == "no_api"
    await kube.close()


@pytest.mark.parametrize("text", ["llm-any", "deployment/", "daemonset/x", "deployment/a/b"])
def test_a_workload_is_named_by_kind(text: str) -> None:
    with pytest.raises(ValueError, match="deployment/NAME or lws/NAME"):
        Target.parse(text)
