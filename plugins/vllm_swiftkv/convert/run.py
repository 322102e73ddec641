"""The whole conversion: check, plan, write, verify, rename."""

from __future__ import annotations

import errno
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_swiftkv.convert.output import Output
from vllm_swiftkv.convert.plan import Plan, make_plan
from vllm_swiftkv.convert.progress import Progress, human
from vllm_swiftkv.convert.source import ConvertError, Source
from vllm_swiftkv.convert.verify import verify

DEFAULT_SHARD_BYTES = 4 << 30


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
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "; make room and run the same command again" if full else ""
        where = f"{error.filename}: " if error.filename else f"{request.out}.partial: " if full else ""
        raise ConvertError(f"{where}{error.strerror or error}{advice}") from error
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
        "peak_rss_bytes": _peak_rss(),
        "plan": plan.digest,
    }


def describe(plan: Plan) -> list[str]:
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


def _write(request: Request, plan: Plan, source: Source, progress: Progress) -> dict[str, Any]:
    output = Output(request.out, plan, source)
    if output.finished:
        progress.say(f"{output.out} is this conversion, finished before")
        return _result(plan, [], _verified(request, output.out, plan, source, progress))
    with output:
        left = output.remaining(progress.say)
        done = plan.size - sum(shard.size for shard in left)
        if done:
            progress.say(f"going on: {len(plan.shards) - len(left)} of {len(plan.shards)} weight files are there")
        progress.start(plan.size, done)
        for shard in left:
            progress.advance(len(shard.header))
            output.write_shard(shard, progress.advance)
            progress.wrote(shard.name)
        progress.stop()
        output.write_rest()
        source.check_unchanged()
        verified = _verified(request, output.partial, plan, source, progress)
        output.finish()
    return _result(plan, [shard.name for shard in left], verified)


def _verified(request: Request, folder: Path, plan: Plan, source: Source, progress: Progress) -> dict[str, int] | None:
    if not request.verify:
        return None
    done = verify(folder, plan, source)
    progress.say(
        f"verified: {done.tensors} tensors; {human(done.copied_bytes)} of the copied and all "
        f"{human(done.initialised_bytes)} of the new ones compared with the source"
    )
    return asdict(done)


def _result(plan: Plan, written: list[str], verified: dict[str, int] | None) -> dict[str, Any]:
    reused = [shard.name for shard in plan.shards if shard.name not in set(written)]
    return {"shards_written": written, "shards_reused": reused, "verified": verified}


def _peak_rss() -> int:
    """Of this program. What getrusage tells includes the memory of the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
