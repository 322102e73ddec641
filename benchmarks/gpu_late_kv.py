"""Late K and V into paged caches on a GPU: the one-launch kernel, vLLM's operators, FlashInfer's append, plain torch.

    python benchmarks/gpu_late_kv.py [--shape 8b] [--cache bf16] [--tokens 1 4096] [--json FILE]

Needs torch, triton and an NVIDIA GPU, no more (from a bare checkout with ``PYTHONPATH=.:kernels``); vLLM and
FlashInfer are measured where they import, and what is missing is said. Each contender's caches are held against the
reference before it is timed.

Times are of CUDA graphs, so launch cost on the host is left out; `host` is that cost, per call outside a graph. Inputs
and slots rotate, so that up to 64 of them exceed four times the L2 cache together. `of copy` is bytes that have to
move, divided by the time, over the bandwidth of a large device copy measured in the same run.

Exit status 1 when the kernel stays below 0.8 of the copy at 4,096 tokens or more, 2 where no GPU can run it. The name
keeps it out of `make bench`, which runs on any machine.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import arguments, positive, show_table, write_result

from suite_kernels import late_kv, late_kv_reference
from suite_kernels.late_kv_caches import PagedCaches

TARGET_OF_COPY = 0.8
TARGET_FROM_TOKENS = 4096
TOKENS = (1, 8, 64, 256, 1024, 4096, 16384)
BLOCK_SIZE = 16
EPS = 1e-6
Call = Callable[[int], None]


@dataclass(frozen=True)
class Shape:
    """One rank's share of a model's late layers."""

    leaders: int
    heads: int
    head_dim: int
    norm: bool = False


SHAPES = {
    "8b": Shape(leaders=16, heads=8, head_dim=128),
    "70b-tp8": Shape(leaders=40, heads=1, head_dim=128),
    "qwen3-8b": Shape(leaders=9, heads=8, head_dim=128, norm=True),
}


class NotHere(Exception):
    """A contender that cannot run on this machine, and why."""


class Problem:
    """Inputs that rotate, and caches in vLLM 0.32's layout: [blocks, kv_heads, block_size, K and V of a head]."""

    def __init__(self, shape: Shape, cache: str, tokens: int, device: torch.device, l2_bytes: int) -> None:
        self.shape, self.tokens = shape, tokens
        dtype = torch.bfloat16
        self.cache_dtype = torch.float8_e4m3fn if cache == "fp8" else dtype
        width = shape.leaders * 2 * shape.heads * shape.head_dim
        self.rotation = max(2, min(64, math.ceil(4 * l2_bytes / (tokens * width * dtype.itemsize))))
        self.gemms = [torch.randn(tokens, width, device=device, dtype=dtype) for _ in range(self.rotation)]
        per_input = -(-tokens // BLOCK_SIZE)
        blocks = per_input * self.rotation
        order = torch.randperm(blocks).view(self.rotation, per_input)
        slots = order[:, :, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)
        self.block_ids = order.int().to(device)
        self.slots = [row.flatten()[:tokens].contiguous().to(device) for row in slots]
        self.positions = torch.arange(tokens, device=device)
        inverse = 500000.0 ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.arange(max(tokens, 2))[:, None] * inverse
        self.table = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device, dtype)
        self.weight = None
        if shape.norm:
            self.weight = torch.rand(shape.leaders, shape.head_dim, device=device, dtype=dtype) + 0.5
        whole = (shape.leaders, blocks, shape.heads, BLOCK_SIZE, 2 * shape.head_dim)
        self.storage = torch.zeros(whole, dtype=torch.uint8 if cache == "fp8" else dtype, device=device)
        views = [tuple(one.transpose(1, 2).split(shape.head_dim, dim=-1)) for one in self.storage]
        self.views = [(k.view(self.cache_dtype), v.view(self.cache_dtype)) for k, v in views]
        self.scales = [0.5] * shape.leaders if cache == "fp8" else None
        self.caches = PagedCaches.of(self.views, self.scales, self.scales)
        elements = tokens * width
        table_bytes = tokens * (shape.head_dim * dtype.itemsize + 2 * 8)
        self.bytes = elements * (dtype.itemsize + self.cache_dtype.itemsize) + table_bytes

    def write(self, function: Callable[..., None], index: int) -> None:
        function(
            self.gemms[index],
            self.positions,
            self.table,
            self.slots[index],
            self.caches,
            is_neox_style=True,
            k_norm_weight=self.weight,
            eps=EPS,
        )

    def split(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K after the norm and V, each [tokens, leaders, heads, head_dim]; V is a view of the GEMM's output."""
        shape = (self.shape.leaders, 2, self.shape.heads, self.shape.head_dim)
        k, v = self.gemms[index].unflatten(1, shape).unbind(2)
        if self.weight is not None:
            k = torch.nn.functional.rms_norm(k, (self.shape.head_dim,), None, EPS) * self.weight[:, None]
        return k, v


def kernel(problem: Problem) -> Call:
    return lambda index: problem.write(late_kv.write_late_kv, index)


def plain_torch(problem: Problem) -> Call:
    """RoPE over all K at once, then one scatter per cache, without a synchronisation."""
    angles = problem.table[problem.positions][:, None, None]
    bytes_ = [[view.view(torch.uint8) if problem.scales else view for view in pair] for pair in problem.views]

    def call(index: int) -> None:
        k, v = problem.split(index)
        k = late_kv_reference.rotate(k, angles, True)
        if problem.scales:
            k, v = (late_kv_reference.to_fp8(x, problem.caches.inverse_scales[0, 0]).view(torch.uint8) for x in (k, v))
        slots = problem.slots[index]
        block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        for layer, (key, value) in enumerate(bytes_):
            key[block, offset] = k[:, layer]
            value[block, offset] = v[:, layer]

    return call


def vllm_rotate() -> Callable[[Problem, torch.Tensor], torch.Tensor]:
    """vLLM's RoPE operator over the K of all late layers, as the model calls it without the kernel."""
    try:
        from vllm import _custom_ops as ops
    except ImportError as error:
        raise NotHere(f"vLLM: {error}") from error
    if not hasattr(torch.ops._C_cache_ops, "reshape_and_cache_flash"):
        raise NotHere("this vLLM has no CUDA operators")

    def rotate(problem: Problem, k: torch.Tensor) -> torch.Tensor:
        flat = k.reshape(problem.tokens, -1)
        if flat.data_ptr() == k.data_ptr():
            flat = flat.clone()
        ops.rotary_embedding(problem.positions, flat, None, problem.shape.head_dim, problem.table, True)
        return flat.view(k.shape)

    return rotate


def vllm_ops(problem: Problem) -> Call:
    """vLLM's RoPE operator, then its `reshape_and_cache_flash` once per layer."""
    rotate = vllm_rotate()
    from vllm import _custom_ops as ops

    scale = torch.tensor(0.5 if problem.scales else 1.0, device=problem.storage.device)
    views = [[view.view(torch.uint8) if problem.scales else view for view in pair] for pair in problem.views]

    def call(index: int) -> None:
        k, v = problem.split(index)
        k = rotate(problem, k)
        for layer, (key, value) in enumerate(views):
            kind = "fp8" if problem.scales else "auto"
            ops.reshape_and_cache_flash(k[:, layer], v[:, layer], key, value, problem.slots[index], kind, scale, scale)

    return call


def flashinfer_append(problem: Problem) -> Call:
    """RoPE, then FlashInfer's append once per layer; FP8 is made by torch first, since append only copies."""
    try:
        from flashinfer import append_paged_kv_cache
    except ImportError as error:
        raise NotHere(f"FlashInfer: {error}") from error
    try:
        rotate = vllm_rotate()
    except NotHere:
        angles = problem.table[problem.positions][:, None, None]

        def rotate(problem: Problem, k: torch.Tensor) -> torch.Tensor:
            return late_kv_reference.rotate(k, angles, True)

    device, tokens = problem.storage.device, problem.tokens
    request = torch.zeros(tokens, dtype=torch.int32, device=device)
    positions = problem.positions.int()
    ends = torch.tensor([0, problem.block_ids.shape[1]], dtype=torch.int32, device=device)
    last = torch.tensor([(tokens - 1) % BLOCK_SIZE + 1], dtype=torch.int32, device=device)
    pages = [(key.transpose(1, 2), value.transpose(1, 2)) for key, value in problem.views]

    def call(index: int) -> None:
        k, v = problem.split(index)
        k = rotate(problem, k)
        if problem.scales:
            k, v = (late_kv_reference.to_fp8(x, problem.caches.inverse_scales[0, 0]) for x in (k, v))
        for layer, pair in enumerate(pages):
            append_paged_kv_cache(
                k[:, layer], v[:, layer], request, positions, pair, problem.block_ids[index], ends, last, "HND"
            )

    return call


CONTENDERS: dict[str, Callable[[Problem], Call]] = {
    "kernel": kernel,
    "vllm": vllm_ops,
    "flashinfer": flashinfer_append,
    "torch": plain_torch,
}


def expected(problem: Problem) -> torch.Tensor:
    """The caches after a write by the reference."""
    problem.storage.zero_()
    problem.write(late_kv_reference.write_late_kv, 0)
    return problem.storage.clone()


def differs(problem: Problem, call: Call, wanted: torch.Tensor) -> str | None:
    """Where a contender's caches differ from the reference's by more than roundings, or None. Every element counts."""
    problem.storage.zero_()
    call(0)
    unit = 2.0**-3 if problem.scales else 2.0**-5  # vLLM's operator rounds each product of RoPE
    for layer, (one, two) in enumerate(zip(problem.storage, wanted, strict=True)):
        found, right = (x.view(problem.cache_dtype).float() for x in (one, two))
        if not torch.allclose(found, right, rtol=unit, atol=unit):
            return f"layer {layer} is off by up to {float((found - right).abs().max()):.3g}"
    return None


def graph_seconds(call: Call, rotation: int, repeats: int) -> float:
    """Median seconds of one call on the device, captured once per rotating input."""
    for index in range(rotation):
        call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(rotation):
            call(index)
    return event_seconds(graph.replay, repeats) / rotation


def event_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds between events around one call, after two warm ones."""
    times = []
    for index in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if index >= 2:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def host_seconds(call: Call, rotation: int, repeats: int) -> float:
    """Median seconds until a call returns, with an empty queue before it."""
    times = []
    for index in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(index % rotation)
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times)


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes per second read and written by a device copy of 1 GiB."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / event_seconds(lambda: target.copy_(source), repeats)


def measure(problem: Problem, repeats: int, copy: float) -> dict[str, Any]:
    """One row: every contender's time, or why it has none."""
    row: dict[str, Any] = {"tokens": problem.tokens, "bytes": problem.bytes, "rotation": problem.rotation}
    wanted = expected(problem)
    for name, make in CONTENDERS.items():
        try:
            call = make(problem)
        except NotHere as reason:
            row[name] = {"missing": str(reason)}
            continue
        if wrong := differs(problem, call, wanted):
            if name == "kernel":
                raise SystemExit(f"the kernel is wrong at {problem.tokens} tokens: {wrong}; nothing timed")
            row[name] = {"missing": f"{name} writes other values: {wrong}"}
            continue
        seconds = graph_seconds(call, problem.rotation, repeats)
        host = host_seconds(call, problem.rotation, repeats)
        row[name] = {"seconds": seconds, "host_seconds": host, "of_copy": problem.bytes / seconds / copy}
    return row


def cells(row: dict[str, Any]) -> list[str]:
    out = [f"{row['tokens']:,}", f"{row['bytes'] / 1e6:,.1f}"]
    for name in CONTENDERS:
        found = row[name]
        if "missing" in found:
            out.append("-")
        else:
            host = f"{found['host_seconds'] * 1e6:.0f}"
            out.append(f"{found['seconds'] * 1e6:,.1f} ({found['of_copy']:.2f}) {host}")
    return out


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--cache", choices=("bf16", "fp8"), nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--tokens", type=positive, nargs="+", default=list(TOKENS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    load_before = os.getloadavg()
    if not late_kv.available("cuda"):
        reason = late_kv.choose("cuda", torch.bfloat16).reason
        print(f"gpu_late_kv: nothing to measure here: {reason}", file=sys.stderr)
        return 2
    torch.manual_seed(args.seed)
    device = torch.device("cuda", torch.cuda.current_device())
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    repeats = 5 if args.quick else 30
    copy = copy_bandwidth(device, repeats)
    print(f"{torch.cuda.get_device_name(device)}: device copy {copy / 1e9:,.0f} GB/s, L2 {l2_bytes >> 20} MiB")
    results: dict[str, Any] = {}
    missed, missing = [], set()
    for shape in args.shape:
        for cache in args.cache:
            name = f"{shape} {cache}"
            obstacle = late_kv.choose(device, torch.float8_e4m3fn if cache == "fp8" else torch.bfloat16).reason
            if obstacle.startswith("compute capability"):
                print(f"{name}: {obstacle}")
                continue
            rows = []
            for tokens in args.tokens:
                rows.append(measure(Problem(SHAPES[shape], cache, tokens, device, l2_bytes), repeats, copy))
                share = rows[-1]["kernel"]["of_copy"]
                if tokens >= TARGET_FROM_TOKENS and share < TARGET_OF_COPY:
                    missed.append(f"{name}, {tokens:,} tokens: {share:.2f} of the copy, target {TARGET_OF_COPY}")
                missing |= {row["missing"] for row in rows[-1].values() if isinstance(row, dict) and "missing" in row}
            results[name] = rows
            columns = ["tokens", "MB", *CONTENDERS]
            show_table(f"{name}: µs (of copy) host µs", columns, [cells(row) for row in rows])
    for line in sorted(missing):
        print(f"not measured: {line}")
    for line in missed:
        print(f"target missed: {line}")
    result = {"copy_bytes_per_second": copy, "l2_bytes": l2_bytes, "seed": args.seed, "shapes": results}
    write_result(args.json, "gpu_late_kv", {**result, "missed": missed}, load_before)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
