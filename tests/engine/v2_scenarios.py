"""Encoder, consumer and monolithic engines on vLLM's V2 model runner, on a CPU, in Triton's interpreter.

``python v2_scenarios.py MODEL FILE`` has to run with ``TRITON_INTERPRET=1`` and packaging/triton-cpu-interpreter on
its path; it writes what the engines answered as one JSON object. A kernel takes milliseconds here, so requests are few.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from epd_engine import Answer, Ask, EpdEngine, Spec, engines, references, runner, without_media
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.mm_encoder_model_runner import MMEncoderModelRunner

from vllm_suite.fleet.pictures_parts import Part, image_part, text_part

FAMILY = "qwen2_5_vl"
V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
QUESTION = text_part("What is it?")


class CPUEncoderRunner(MMEncoderModelRunner, CPUModelRunner):
    """The V2 runner of an encoder-only instance, as GPUs have it."""


class EncoderWorker(CPUWorker):
    """On V2 vLLM's CPU worker takes the runner of a whole model for an encoder-only instance, unlike its GPU worker."""

    def init_device(self) -> None:
        super().init_device()
        self.model_runner = CPUEncoderRunner(self.vllm_config, self.device)


def one(seed: int) -> list[Part]:
    return [image_part(112, 112, seed, uuid=f"s-{seed}")]


def said(answer: Answer) -> dict[str, Any]:
    return {"tokens": answer.tokens, "logprobs": answer.logprobs}


def runner_name(llm: Any) -> str:
    return f"{type(runner(llm)).__module__}.{type(runner(llm)).__name__}"


def whole(model: Path, requests: list[list[Part]]) -> dict[str, Any]:
    with engines(Spec("v2", model, "mono", env=V2), Spec("v1", model, "mono", env=V1)) as pair:
        return {
            engine.spec.name: {
                "runner": engine.call(runner_name),
                "answers": [said(engine.ask([*items, QUESTION])) for items in requests],
            }
            for engine in pair
        }


def apart(model: Path, requests: list[list[Part]]) -> dict[str, Any]:
    encoder = Spec("e", model, "e", env=V2, llm={"worker_cls": "v2_scenarios.EncoderWorker"})
    with engines(encoder, Spec("pd", model, "pd", env=V2)) as (e, pd):
        answers = [_stages(e, pd, items) for items in requests]
        known = e.counts().items
        e.encode(requests[0])
        batch = [Ask([*items, QUESTION], ec=references(e.encode(items))) for items in (one(21), one(22))]
        return {
            "runners": [engine.call(runner_name) for engine in (e, pd)],
            "answers": [said(answer) for answer in answers],
            "encoded again": e.counts().items - known - 2,
            "batch": [said(answer) for answer in pd.ask_many(batch)],
            "alone": [said(pd.ask([*items, QUESTION])) for items in (one(21), one(22))],
            "encoded by the consumer": pd.counts().items,
        }


def _stages(e: EpdEngine, pd: EpdEngine, items: list[Part]) -> Answer:
    ec = e.encode(items)
    return pd.ask([*without_media(FAMILY, items, ec), QUESTION], ec=references(ec))


def full(model: Path, requests: list[list[Part]]) -> dict[str, Any]:
    """An instance of role `any` encodes for a consumer, and answers by itself."""
    with engines(Spec("a", model, "any", env=V2), Spec("pd", model, "pd", env=V2)) as (a, pd):
        answers = [_stages(a, pd, items) for items in requests]
        return {
            "answers": [said(answer) for answer in answers],
            "by itself": [said(a.ask([*items, QUESTION])) for items in requests],
            "encoded by the consumer": pd.counts().items,
        }


def main(model: Path, file: Path) -> None:
    requests = [one(1), [*one(2), *one(3)]]
    file.write_text(
        json.dumps(
            {"whole": whole(model, requests), "apart": apart(model, requests), "any": full(model, requests)}, indent=1
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
