"""`tables`: step times from measured layer times, in the layout of LLMServingSim's profiles.

A folder has ``meta.yaml`` and for each tensor-parallel size ``tp<N>/`` with ``dense.csv`` (layer, tokens),
``attention.csv`` (prefill_chunk, kv_prefill, n_decode, kv_decode) and ``per_sequence.csv`` (layer, sequences), all in
microseconds of one layer on one rank, and ``skew_fit.csv`` where differing contexts were measured too. Collectives are
not in it: they come from the cluster's links, or from tables of their own. A mixture of experts has ``tp1/moe.csv``
(tokens, activated_experts) in place of the MLP's layers.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vllm_suite.planner.hardware.collectives import Collectives, Kind
from vllm_suite.planner.models import Model, Parallel
from vllm_suite.planner.models.sharding import check
from vllm_suite.planner.sources.attention_table import AttentionTable
from vllm_suite.planner.sources.base import (
    FloatArray,
    LatencySource,
    Outside,
    SourceError,
    Uncertainty,
    as_arrays,
)
from vllm_suite.planner.sources.expert_table import ExpertTable
from vllm_suite.planner.sources.skew import Skew
from vllm_suite.planner.sources.steps import DecodeLine, Steps

# How often a step runs each measured layer: in every decoder layer, or once.
_IN_LAYER = {"layernorm": 2, "qkv_proj": 1, "qk_norm": 1, "rotary_emb": 1, "o_proj": 1, "gate_up_proj": 1, "act_fn": 1,
             "down_proj": 1}  # fmt: skip
_MLP = ("gate_up_proj", "act_fn", "down_proj")
_ONCE = ("embedding", "final_layernorm")
_AROUND_EXPERTS: tuple[Kind, ...] = ("all_gather", "reduce_scatter")
_PER_SEQUENCE = ("lm_head", "sampler")
_NOISE = "three runs of each kernel, which its authors put at about 5 %; collectives and host time are not measured"


class TableSource(LatencySource):
    """Step times of a model that was profiled on the hardware itself.

    Less than the smallest measured size takes as long as that; more than the largest is refused or clamped and counted.
    Several prompt chunks in a step are costed as one with as many query-key pairs. Pipeline stages share a step evenly.
    With experts over data-parallel ranks, every rank is taken to have the same step.
    """

    def __init__(
        self,
        folder: Path,
        model: Model,
        parallel: Parallel,
        *,
        collectives: Collectives | None = None,
        step_us: float = 0.0,
        sequence_us: float = 0.0,
        imbalance: float = 1.2,
        outside: Outside | None = None,
    ) -> None:
        """Read a profile.

        Args:
            folder: the one with ``meta.yaml``.
            collectives: of the cluster; needed above one rank.
            step_us, sequence_us: host time that is not hidden, for each step and each of its sequences.
            imbalance: rows of the busiest rank's experts over the mean, with experts spread over ranks.

        Raises:
            SourceError: a file is missing or has rows that do not fit; the text names it. ModelError: see `check`.
        """
        check(model, parallel)
        if any(layer.late or (layer.attention and layer.attention.window) for layer in model.layers):
            raise SourceError(f"{model.name}: tables know neither SwiftKV's late layers nor sliding windows")
        if parallel.gpus > 1 and collectives is None:
            raise SourceError(f"{folder}: collectives over {parallel.gpus} ranks are not in it; name the cluster")
        if model.moe and parallel.expert_ranks > 1 and not parallel.ep:
            raise SourceError(f"{folder}: experts cut over ranks were not profiled, only whole ones on ranks (ep)")
        tp = parallel.tp
        meta = _meta(folder / "meta.yaml", tp)
        own = folder / f"tp{tp}"
        dense, heads = _layers(own / "dense.csv", "tokens"), _layers(own / "per_sequence.csv", "sequences")
        sparse = [layer for layer in model.layers if layer.moe]
        needed = ("qkv_proj", "o_proj") if len(sparse) == len(model.layers) else ("qkv_proj", "o_proj", "down_proj")
        _known(own / "dense.csv", dense, (*_IN_LAYER, *_ONCE), needed)
        _known(own / "per_sequence.csv", heads, _PER_SEQUENCE, needed=("lm_head",))
        self.name = f"tables {meta.get('model', model.name)} on {meta.get('hardware', folder.name)}, TP{tp}"
        self.outside, self._layers = outside or Outside(), len(model.layers)
        self.uncertainty = Uncertainty(0.05, _NOISE)
        self.stages = parallel.pp
        counts = {name: count * self._layers for name, count in _IN_LAYER.items()}
        counts |= {name: self._layers - len(sparse) for name in _MLP} | dict.fromkeys(_ONCE, 1)
        self._tokens = _dense_sum(dense, counts)
        if sparse:
            experts = ExpertTable.read(folder / "tp1" / "moe.csv", parallel.expert_ranks if parallel.ep else 1)
            self._tokens = self._tokens[: experts.limit(parallel) + 1]
            self._tokens += len(sparse) * experts.seconds(sparse[0], parallel, len(self._tokens) - 1, imbalance)
        self._sampled = _dense_sum(heads, dict.fromkeys(_PER_SEQUENCE, 1))
        self.max_tokens, self.max_sequences = len(self._tokens) - 1, len(self._sampled) - 1
        if collectives is not None:
            self._add_collectives(collectives, model, parallel)
        self._sampled[1:] += (step_us + sequence_us * np.arange(1, self.max_sequences + 1)) * 1e-6
        skew = None
        if meta.get("skew_fit", {}).get("enabled") and (own / "skew_fit.csv").is_file():
            skew = Skew(own, meta["skew_fit"], tp)
        self.attention = AttentionTable.read(own / "attention.csv", skew, self.outside)
        self._token_list, self._sampled_list = self._tokens.tolist(), self._sampled.tolist()

    def _add_collectives(self, collectives: Collectives, model: Model, parallel: Parallel) -> None:
        ranks, everyone, row = range(parallel.tp), range(parallel.expert_ranks), model.hidden * 2
        sparse = sum(layer.moe for layer in model.layers) if parallel.dp > 1 else 0
        reduce, behind = 2 * self._layers + 1 - sparse, range(parallel.expert_ranks + 1)
        for count in range(1, self.max_tokens + 1):
            size = count * row
            seconds = reduce * collectives.seconds("all_reduce", size, ranks)
            # With experts over data-parallel ranks every rank's rows are gathered before them and scattered after.
            for kind in _AROUND_EXPERTS if sparse else ():
                seconds += sparse * collectives.seconds(kind, parallel.dp * size, everyone)
            if parallel.pp > 1:
                seconds += (parallel.pp - 1) * collectives.seconds("p2p", 2 * size, behind)
            self._tokens[count] += seconds
        for count in range(1, self.max_sequences + 1):
            self._sampled[count] += collectives.seconds("all_gather", count * model.vocab * 2, ranks)

    def step_seconds(self, steps: Steps) -> float:
        """See `LatencySource`."""
        if not steps.tokens:
            return 0.0
        return self._fixed(steps.tokens, steps.sequences) + self._layers * self.attention.seconds(steps)

    def _fixed(self, tokens: float, sequences: float) -> float:
        if tokens > self.max_tokens:
            tokens = self.outside.clamp("tokens", tokens, 0, self.max_tokens)
        if sequences > self.max_sequences:
            sequences = self.outside.clamp("sequences", sequences, 0, self.max_sequences)
        return float(self._token_list[int(tokens)] + self._sampled_list[int(sequences)])

    def seconds(self, steps: Steps) -> FloatArray:
        """See `LatencySource`."""
        rows = as_arrays(steps)
        tokens = self.outside.clamp_all("tokens", rows.tokens, 0, self.max_tokens).astype(int)
        sequences = self.outside.clamp_all("sequences", rows.sequences, 0, self.max_sequences).astype(int)
        fixed = self._tokens[tokens] + self._sampled[sequences]
        return np.where(rows.tokens > 0, fixed + self._layers * self.attention.many(rows), 0.0)

    def decode_line(self, sequences: int, context: float, longest: float = 0, shortest: float = 0) -> DecodeLine:
        """See `LatencySource`; it holds up to the next measured context."""
        steps = Steps(
            decode_sequences=sequences, decode_context=context, decode_longest=longest, decode_shortest=shortest
        )
        line = self.attention.growth(steps)
        fixed = self._fixed(sequences, sequences)
        return DecodeLine(fixed + self._layers * line.seconds, self._layers * line.slope, line.steps)


def _meta(path: Path, tp: int) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SourceError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise SourceError(f"{path}: an object is expected")
    if not (path.parent / f"tp{tp}").is_dir():
        sizes = sorted(each.name for each in path.parent.glob("tp*"))
        raise SourceError(f"{path.parent}: no tp{tp}; there are {', '.join(sizes) or 'none'}")
    return found


def _layers(path: Path, by: str) -> dict[str, tuple[list[float], list[float]]]:
    """Of each layer the measured sizes, ascending, and seconds."""
    found: dict[str, dict[float, float]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for line, row in enumerate(csv.DictReader(file), 2):
                try:
                    found.setdefault(row["layer"], {})[float(row[by])] = float(row["time_us"]) * 1e-6
                except (KeyError, TypeError, ValueError) as error:
                    raise SourceError(f"{path}:{line}: layer, {by} and time_us are expected: {error!r}") from error
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}") from error
    return {name: (sorted(rows), [rows[size] for size in sorted(rows)]) for name, rows in found.items()}


def _known(path: Path, found: dict[str, Any], known: tuple[str, ...], needed: tuple[str, ...]) -> None:
    unknown, missing = sorted(set(found) - set(known)), sorted(set(needed) - set(found))
    if unknown or missing:
        what = f"layers that are not known: {', '.join(unknown)}" if unknown else f"no layer {', '.join(missing)}"
        raise SourceError(f"{path}: {what}")


def _dense_sum(layers: dict[str, tuple[list[float], list[float]]], counts: dict[str, int]) -> FloatArray:
    """Seconds of all layers for every size from 0 to the largest that all were measured at."""
    most = int(min(sizes[-1] for sizes, _ in layers.values()))
    every = np.arange(1, most + 1, dtype=float)
    total = np.zeros(most + 1)
    for name, (sizes, times) in layers.items():
        total[1:] += counts[name] * np.interp(every, sizes, times)
    return total
