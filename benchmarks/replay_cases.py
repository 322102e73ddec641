"""What is replayed: the cases of the result table, and the scheduling policies beside each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from replay_engine import Client, EngineSettings
from replay_steps import AffineSteps
from replay_traces import Row
from replay_workload import Arrivals, Room

# An invented machine of the speed of one large GPU with a small model: it ranks policies and is no GPU result.
STEPS = AffineSteps(step=9e-3, per_sequence=20e-6, per_kv_token=22e-9, per_prefill_token=22e-6)
FACTORY = "vllm_dler.scheduler.make_scheduler"
KV_BOUND = Room(blocks=9375, seqs=128)
SLOT_BOUND = Room(blocks=62500, seqs=64)


@dataclass(frozen=True)
class Case:
    """One workload on one engine.

    Attributes:
        files: names in the data folder's `traces`, or paths.
        requests: of one run; None for what the command line says.
        labels: whether requests carry their class.
    """

    name: str
    files: tuple[str, ...]
    arrivals: Arrivals
    room: Room
    requests: int | None = None
    labels: bool = True
    prefix_caching: bool = False
    ahead: bool = False

    def settings(self) -> EngineSettings:
        return EngineSettings(room=self.room, prefix_caching=self.prefix_caching, ahead=self.ahead)


_R1, _LMSYS = ("servegen_r1_SAMPLED_5000.csv",), ("ssjf_lmsys_vicuna13b_predictions.csv.gz",)
_CONV, _CODE = "AzureLLMInferenceTrace_2023_conv.csv", "AzureLLMInferenceTrace_2023_code.csv"

CASES = (
    Case("r1-kv", _R1, Arrivals(rate=1.92), KV_BOUND),
    Case("r1-kv-over", _R1, Arrivals(rate=2.2), KV_BOUND),
    Case("r1-kv-async", _R1, Arrivals(rate=1.92), KV_BOUND, ahead=True),
    Case("r1-slot", _R1, Arrivals(rate=3.0), SLOT_BOUND),
    Case("r1-kv-0.8", _R1, Arrivals(load=0.8), KV_BOUND),
    Case("r1-kv-bursty", _R1, Arrivals("gamma", load=0.9, cv=3.0), KV_BOUND),
    Case("r1-kv-no-class", _R1, Arrivals(rate=1.92), KV_BOUND, labels=False),
    Case("r1-day", ("servegen_deepseek-r1.tar.gz",), Arrivals(load=1.0), KV_BOUND),
    Case("lmsys-1.2", _LMSYS, Arrivals(load=1.2), SLOT_BOUND),
    Case("lmsys-0.9", _LMSYS, Arrivals(load=0.9), SLOT_BOUND),
    Case("azure-1.0", (_CODE, _CONV), Arrivals("recorded", load=1.0), SLOT_BOUND),
    Case("azure-1.2", (_CODE, _CONV), Arrivals("recorded", load=1.2), SLOT_BOUND),
    Case("azure-0.8", (_CODE, _CONV), Arrivals("recorded", load=0.8), SLOT_BOUND),
    Case("azure-conv", (_CONV,), Arrivals("recorded", load=1.0), SLOT_BOUND),
    Case(
        "mooncake",
        ("mooncake_synthetic_trace.jsonl.gz",),
        Arrivals("recorded", load=1.2),
        Room(blocks=40000, seqs=128),
        requests=480,
        prefix_caching=True,
    ),
    Case("arxiv", ("vidur_arxiv_summarization.csv.gz",), Arrivals(load=1.1), KV_BOUND),
)


class ClassMeans:
    """A per-class mean of finished lengths, the idea of vllm-ascend's BatchJobAwareScheduler, as a client could do it:
    the mean so far becomes the request's priority when it arrives.

    A class that has not finished yet counts as 128 tokens, as there.
    """

    def __init__(self) -> None:
        self._means: dict[str, float] = {}

    def priority(self, row: Row) -> int:
        return round(self._means.get(row.label, 128.0))

    def finished(self, row: Row) -> None:
        known = self._means.get(row.label)
        self._means[row.label] = row.output if known is None else known + 0.2 * (row.output - known)


Make = Callable[[EngineSettings, dict[str, Any]], tuple[EngineSettings, Client]]


def _fcfs(settings: EngineSettings, options: dict[str, Any]) -> tuple[EngineSettings, Client]:
    return settings, Client()


def _prompt(settings: EngineSettings, options: dict[str, Any]) -> tuple[EngineSettings, Client]:
    return replace(settings, policy="priority"), Client(priority=lambda row: row.prompt)


def _oracle(settings: EngineSettings, options: dict[str, Any]) -> tuple[EngineSettings, Client]:
    # The one policy that is told the answer: what perfect predictions would be worth.
    return replace(settings, policy="priority"), Client(priority=lambda row: row.output)


def _class_mean(settings: EngineSettings, options: dict[str, Any]) -> tuple[EngineSettings, Client]:
    means = ClassMeans()
    return replace(settings, policy="priority"), Client(means.priority, means.finished)


def _ours(settings: EngineSettings, options: dict[str, Any]) -> tuple[EngineSettings, Client]:
    return replace(settings, scheduler_cls=FACTORY, additional={"suite": {"dler": options}}), Client()


# All but the last are vLLM's own scheduler; a priority is what its clients may set on a request.
POLICIES: dict[str, Make] = {
    "fcfs": _fcfs,
    "prompt": _prompt,
    "class-mean": _class_mean,
    "oracle": _oracle,
    "ours": _ours,
}


def make_policy(text: str, settings: EngineSettings) -> tuple[EngineSettings, Client]:
    """A policy by name, with settings of ours behind a colon: ``ours:kappa=0.05,victims.enabled=false``.

    Raises ValueError.
    """
    name, _, rest = text.partition(":")
    if name not in POLICIES:
        raise ValueError(f"no policy {name!r}; there are {', '.join(POLICIES)}")
    options: dict[str, Any] = {}
    for part in rest.split(",") if rest else ():
        key, equals, value = part.partition("=")
        if not equals or name != "ours":
            raise ValueError(f"{text!r}: settings are KEY=VALUE, and of `ours` alone")
        *outer, last = key.split(".")
        section = options
        for name_of in outer:
            section = section.setdefault(name_of, {})
        section[last] = _value(value)
    return POLICIES[name](settings, options)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def find_files(files: Sequence[str], data: Path) -> list[Path]:
    """Trace files by path, or by name in the data folder. Raises FileNotFoundError."""
    found = []
    for name in files:
        path = next((p for p in (Path(name), data / "traces" / name) if p.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"no trace {name}, nor {data / 'traces' / name}; set VLLM_SUITE_DATA")
        found.append(path)
    return found
