"""The whole conversion: check, plan, write, verify, rename."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vllm_suite.checkpoints.disk import in_words
from vllm_suite.checkpoints.output import Kind, Output, shards_report, write_shards
from vllm_suite.checkpoints.progress import Progress, human, peak_rss
from vllm_suite.checkpoints.shards import DEFAULT_SHARD_BYTES
from vllm_suite.checkpoints.source import CheckpointError, Source
from vllm_swiftkv.convert.data import data_of
from vllm_swiftkv.convert.errors import ConvertError
from vllm_swiftkv.convert.plan import SwiftKVPlan, make_plan
from vllm_swiftkv.convert.verify import verify

KIND = Kind(
    noun="conversion",
    manifest="swiftkv_conversion.json",
    changes={"files": "the source changed", "config": "the source's config.json changed"},
)


@dataclass(frozen=True)
class Request:
    """What to convert. Exactly one of `cut` and `cut_layer` is given; see `plan.choose_split`.

    `shard_bytes`: data per weight file. `keep_teacher`: keep the tail's own q, k and v beside the new ones.
    """

    model: Path
    out: Path
    cut: float | None = None
    cut_layer: int | None = None
    group: int = 1
    keep_teacher: bool = False
    shard_bytes: int = DEFAULT_SHARD_BYTES
    verify: bool = True


def convert(request: Request, progress: Progress) -> dict[str, Any]:
    """Do it, or go on with it, and return a report of JSON types.

    Memory beyond the interpreter's is a few tens of MiB, whatever the size of the checkpoint; with groups, a few
    copies of one k_proj while verifying. Raises SwiftKVError with one line for the person who asked; then ``OUT``
    does not exist, and what ``OUT.partial`` holds is used by the next attempt.
    """
    began = time.monotonic()
    try:
        with Source(request.model) as source:
            plan = make_plan(
                source, request.cut, request.cut_layer, request.group, request.keep_teacher, request.shard_bytes
            )
            for line in describe(plan):
                progress.say(line)
            written = _write(request, plan, source, progress)
    except CheckpointError as error:
        raise ConvertError(str(error)) from error
    except OSError as error:
        raise ConvertError(in_words(error, request.out)) from error
    return {
        "ok": True,
        "model": str(request.model),
        "out": str(request.out),
        "family": plan.family.base_model_type,
        "architecture": plan.family.architecture,
        "layers": plan.split.layers,
        "num_key_value_layers": plan.split.cut,
        "key_value_group_size": plan.split.group,
        "skip": plan.split.tail / plan.split.layers,
        "tensors": sum(1 for _ in plan.entries),
        "initialised": [entry.name for entry in plan.entries if entry.initialised],
        "dropped": list(plan.dropped),
        "bytes": plan.size,
        **written,
        "seconds": time.monotonic() - began,
        "peak_rss_bytes": peak_rss(),
        "plan": plan.digest,
    }


def describe(plan: SwiftKVPlan) -> list[str]:
    """The plan in a few lines."""
    split = plan.split
    leaders = f", shared in groups of {split.group}" if split.group > 1 else ""
    return [
        f"{plan.family.base_model_type}, {split.layers} layers: 0-{split.cut - 1} keep their own keys and values "
        f"(num_key_value_layers {split.cut}), {split.cut}-{split.layers - 1} take theirs from layer {split.cut - 1}'s "
        f"output{leaders}",
        f"prompt tokens skip {split.tail} of {split.layers} layers ({split.tail / split.layers:.1%}); "
        f"{len(split.leaders)} of the skipped layers have a KV cache",
    ]


def _write(request: Request, plan: SwiftKVPlan, source: Source, progress: Progress) -> dict[str, Any]:
    output = Output(request.out, KIND, plan, side=source, sources=[source])
    if output.finished:
        progress.say(f"{output.out} is this conversion, finished before")
        return shards_report(plan, []) | {"verified": _verified(request, output.out, plan, source, progress)}
    with output:
        shards = write_shards(output, plan, progress, begin=lambda: partial(data_of, source=source))
        output.write_rest()
        source.check_unchanged()
        verified = _verified(request, output.partial, plan, source, progress)
        output.finish()
    return shards | {"verified": verified}


def _verified(
    request: Request, folder: Path, plan: SwiftKVPlan, source: Source, progress: Progress
) -> dict[str, int] | None:
    if not request.verify:
        return None
    done = verify(folder, plan, source)
    progress.say(
        f"verified: {done.tensors} tensors; {human(done.copied_bytes)} of the copied and all "
        f"{human(done.initialised_bytes)} of the new ones compared with the source"
    )
    return asdict(done)
