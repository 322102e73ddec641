"""E4: what the search gains over plans drawn at random, beside table 5 of the EPD paper (arXiv 2501.05460).

The paper finds a goodput of 1.25 for its optimiser's plan and of 0.56 on average for ten random ones, on 8 x A100 with
MiniCPM-V 2.6; the factor is 2.2. Rates, sampler and space are not published, so only the shape can be compared. Here
the model is InternVL2-26B, with two pictures of 4032 x 3024 in a request, 22 tokens of text and 10 of output, and the
paper's targets for it: TTFT 3.5 s, TPOT 70 ms.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import load
from vllm_suite.planner.plan import Slo
from vllm_suite.planner.search.baseline import Baseline, random_plans
from vllm_suite.planner.search.candidates import candidates
from vllm_suite.planner.search.case import Case
from vllm_suite.planner.search.choices import Choices, Settings
from vllm_suite.planner.search.search import Effort, SearchResult, search
from vllm_suite.planner.search.sources import Sources, source_maker
from vllm_suite.planner.search.space import Space, room
from vllm_suite.planner.simulator.setting import Setting
from vllm_suite.planner.traces import item_of, synthetic
from vllm_suite.planner.validation.check import Check

EXPECTED = 1.8
PAPER = 1.25 / 0.56


def checks(data: Path) -> Iterator[Check]:
    """E4. Nothing of the data folder is needed."""
    result, drawn = optimiser()
    best = result.best
    ours = best.goodput / drawn.mean if best is not None and drawn.mean else None
    told = "no plan" if best is None else f"{best.plan.name}: {best.goodput:.3g}/s; random: {drawn.mean:.3g}/s"
    yield Check(
        "E4",
        "goodput of the best plan over the mean of ten random plans, 8 x A100, two pictures",
        ours,
        PAPER,
        "EPD paper, table 5, by a reading note; another model, workload and space: shape only",
        None if ours is None else ours / PAPER - 1,
        f"at least {EXPECTED}",
        "holds" if ours is not None and ours >= EXPECTED else "missed",
        note=f"{told}; step times from the roofline, uncalibrated",
    )


def optimiser(gpus: int = 8, requests: int = 400, seed: int = 0) -> tuple[SearchResult, Baseline]:
    """The search and ten random plans of its space, on as many A100.

    Args:
        requests: of a simulation at least.
        seed: of the random plans.
    """
    model, stored = load("OpenGVLab/InternVL2-26B")
    assert model.encoder is not None
    hardware = cluster(f"{gpus}xA100-80G")
    items = (item_of(model.encoder, "4032x3024"),) * 2
    workload, slo = synthetic(22, 10, items=items), Slo(3.5, 0.07)
    sources = Sources(source_maker("roofline", hardware), model, stored, hardware)
    setting = Setting(model, stored, hardware, sources, sources.encode)
    # More settings would repeat plans that differ in nothing that matters here.
    one = (Settings(256, 8192),)
    choices = Choices(pp=(1,), tp=(1, 2, 4), any=one, prefill=one, decode=one)
    case = Case("InternVL2-26B", model, stored, hardware, workload, slo, "goodput", None, sources, setting, choices,
                requests=requests)  # fmt: skip
    prompt, both = case.lengths()
    fits = room(lambda pool, encoder: setting.limits(pool, encoder=encoder).blocks * 16, prompt, both)
    space = Space(model, hardware, choices, fits, items=True)
    sample = case.sample()
    listed, evaluate = candidates(space, case.bounds(sample)), case.evaluate(sample)
    result = search(space, listed, evaluate, case.objective(), effort=Effort(processes=1))
    return result, random_plans(space, listed, evaluate, seed=seed)
