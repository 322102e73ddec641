"""KV pull between two processes: our connector's worker beside raw NIXL and beside a plain copy.

Two engines are started, the decode side makes a genuine handshake, and then its worker is called directly: a pull is
timed from the order the scheduler gives to the report that the KV is here, with no engine step between. Every
method moves the same blocks, in turn, in one run:

    ours         SuiteNixlConnector's worker
    vLLM         the same worker with our overrides bypassed
    raw NIXL     make_prepped_xfer, transfer, check, release: same agent, descriptor lists and notice
    vm_readv     process_vm_readv over the same blocks; UCX moves bytes between local processes with it
    copy         numpy, one contiguous piece inside one process

A second pass reads through another NIXL agent whose progress thread spins as NIXL ships it; ours sleeps.
The column "ours/raw" is bandwidth against bandwidth: the median over rounds of (raw NIXL's time / our time).

    python benchmarks/bench_kv_pull.py [--descriptor-kib 16,64] [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from common import arguments, positive, scratch, show_table, size_text, spread, transfer_config, write_result

TARGET_RATIO = 0.95
TARGET_FROM = 8 << 20
SIZES = (64 << 10, 256 << 10, 1 << 20, 8 << 20, 32 << 20, 128 << 20, 256 << 20)
BLOCK_TOKENS = 32
METHODS = ["ours", "stock", "raw", "vm_readv", "copy"]
# One block of all layers is 64 KiB in both, the smallest size: layers, KV heads, head size (float32, K and V).
SHAPES = {16: (4, 1, 64), 64: (1, 2, 128)}


def run_shape(descriptor_kib: int, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Start two engines whose KV block is ``descriptor_kib`` a layer, and measure every size."""
    from kv_memory import fill, layout
    from kv_pull_child import Case, Peer, measure, open_shipped_agent
    from pd import Spec, engines, prompt

    from vllm_suite.fleet.tiny import TinyConfig, make_tiny_model

    layers, kv_heads, head_dim = SHAPES[descriptor_kib]
    config = TinyConfig(layers=layers, kv_heads=kv_heads, head_dim=head_dim, hidden_size=128, heads=2)
    model = make_tiny_model(folder / f"tiny-{descriptor_kib}", config)
    block = config.kv_bytes_per_token * BLOCK_TOKENS
    blocks = max(args.sizes) // block
    specs = [
        Spec(
            name,
            model,
            blocks=blocks + 2,
            llm={
                "block_size": BLOCK_TOKENS,
                "kv_cache_memory_bytes": (blocks + 2) * block,
                "kv_transfer_config": transfer_config("SuiteNixlConnector", role),
            },
        )
        for name, role in (("p", "kv_producer"), ("d", "kv_consumer"))
    ]
    cases = [Case(size // block, order) for size in args.sizes for order in args.orders]
    with engines(*specs) as (p, d):
        text = prompt(200, 1)
        params = p.prefill(text)
        d.generate(text, dict(params))  # the handshake
        p.call(fill, args.seed)
        rows = p.call(layout)
        assert rows[0, 1] == descriptor_kib << 10, f"one descriptor is {rows[0, 1]} bytes"
        pid = p.process.pid or 0
        peer = Peer(params, rows, pid)
        for case in (cases[0], cases[-1]):
            for method in METHODS[:-1]:
                verify(p, d, peer, case, method, args.seed)
        d.call(fill, args.seed + 1)
        first = d.call(measure, peer, cases, METHODS, args.rounds, args.inner_bytes, args.seed, timeout_s=280.0)
        agent = p.call(open_shipped_agent)
        peer = Peer(params, rows, pid, agent)
        second = d.call(
            measure, peer, cases, ["ours", "raw_shipped"], max(args.rounds // 2, 2), args.inner_bytes, args.seed,
            timeout_s=280.0,
        )  # fmt: skip
    return [summarise(descriptor_kib, case, first, second) for case in cases]


def verify(p: Any, d: Any, peer: Any, case: Any, method: str, seed: int) -> None:
    """Raise unless the bytes that a method brings are the bytes the prefill side holds."""
    from kv_memory import checksum
    from kv_pull_child import check

    descriptors, got = d.call(check, peer, case, method, seed)
    if got != p.call(checksum, descriptors):
        raise RuntimeError(f"{method} brought wrong bytes: {case}")


def summarise(descriptor_kib: int, case: Any, first: list[Any], second: list[Any]) -> dict[str, Any]:
    """One row of the result."""
    times: dict[str, list[list[float]]] = {m: rounds for c, _, m, rounds in first if c == case}
    shipped = {m: rounds for c, _, m, rounds in second if c == case}
    size = next(size for c, size, _, _ in first if c == case)
    methods = {name: _one_method(size, rounds) for name, rounds in times.items()}
    methods["raw_shipped"] = _one_method(size, shipped["raw_shipped"])
    return {
        "bytes": size,
        "order": case.order,
        "descriptor_bytes": descriptor_kib << 10,
        "descriptors": size // (descriptor_kib << 10),
        "methods": methods,
        "ours_to_raw": _paired(times["ours"], times["raw"]),
        "ours_minus_raw_us": 1e6 * _difference(times["ours"], times["raw"]),
        "ours_to_vllm": _paired(times["ours"], times["stock"]),
        "ours_to_raw_shipped": _paired(shipped["ours"], shipped["raw_shipped"]),
    }


def _one_method(size: int, rounds: list[list[float]]) -> dict[str, Any]:
    flat = [seconds for one in rounds for seconds in one]
    return {"us": spread([1e6 * s for s in flat]), "gb_per_s": size / statistics.median(flat) / 1e9}


def _paired(ours: list[list[float]], other: list[list[float]]) -> float:
    """Bandwidth against bandwidth, round by round, so that a busy moment falls on both."""
    return statistics.median(
        statistics.median(theirs) / statistics.median(mine) for mine, theirs in zip(ours, other, strict=True)
    )


def _difference(ours: list[list[float]], other: list[list[float]]) -> float:
    return statistics.median(
        statistics.median(mine) - statistics.median(theirs) for mine, theirs in zip(ours, other, strict=True)
    )


def show(rows: list[dict[str, Any]]) -> None:
    """One table per descriptor size."""
    columns = ["size", "blocks", "ours us", "ours", "vLLM", "raw NIXL", "raw, spinning", "vm_readv", "copy"]
    columns += ["ours-raw us", "ours/raw", "ours/vLLM"]
    for descriptor in sorted({row["descriptor_bytes"] for row in rows}):
        table = []
        for row in rows:
            if row["descriptor_bytes"] != descriptor:
                continue
            m = row["methods"]
            speeds = [f"{m[k]['gb_per_s']:.2f}" for k in ("ours", "stock", "raw", "raw_shipped", "vm_readv", "copy")]
            head = [size_text(row["bytes"]), row["order"], f"{m['ours']['us']['median']:.0f}"]
            speeds.append(f"{row['ours_minus_raw_us']:.0f}")
            table.append([*head, *speeds, f"{row['ours_to_raw']:.3f}", f"{row['ours_to_vllm']:.3f}"])
        show_table(f"KV pull, descriptors of {size_text(descriptor)}: GB/s, medians", columns, table)


def targets(rows: list[dict[str, Any]]) -> dict[str, bool | None]:
    """Whether ours reaches 95 % of raw NIXL in every row from 8 MiB up; None where no such row was measured."""
    large = [row["ours_to_raw"] >= TARGET_RATIO for row in rows if row["bytes"] >= TARGET_FROM]
    return {"ours_at_least_0.95_of_raw_nixl_from_8_mib": all(large) if large else None}


def sizes(text: str) -> list[int]:
    """Argument type: sizes in KiB, each a multiple of 64."""
    result = sorted({positive(part) << 10 for part in text.split(",")})
    if any(size % SIZES[0] for size in result):
        raise argparse.ArgumentTypeError("each size must be a multiple of 64 KiB")
    return result


def shapes(text: str) -> list[int]:
    """Argument type: descriptor sizes."""
    result = sorted({positive(part) for part in text.split(",")})
    if any(size not in SHAPES for size in result):
        raise argparse.ArgumentTypeError(f"descriptors can be {', '.join(map(str, SHAPES))} KiB")
    return result


def main() -> int:
    """Command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--descriptor-kib", type=shapes, default=sorted(SHAPES), metavar="LIST")
    parser.add_argument("--sizes-kib", type=sizes, dest="sizes", default=list(SIZES), metavar="LIST")
    parser.add_argument("--rounds", type=positive, default=25)
    parser.add_argument("--inner-mib", type=positive, default=8, help="bytes a round moves by repeating a small size")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.orders = ["contiguous", "scattered"]
    args.inner_bytes = args.inner_mib << 20
    if args.quick:
        args.rounds = 3
    load = os.getloadavg()
    rows = []
    with scratch("bench-kv-pull-") as folder:
        for descriptor_kib in args.descriptor_kib:
            rows += run_shape(descriptor_kib, args, folder)
    held = targets(rows)
    show(rows)
    for name, value in held.items():
        print(f"{name}: {'not measured' if value is None else 'yes' if value else 'NO'}")
    settings = {"rounds": args.rounds, "inner_bytes": args.inner_bytes, "seed": args.seed, "quick": args.quick}
    write_result(args.json, "kv_pull", {"settings": settings, "rows": rows, "targets": held}, load)
    return 0


if __name__ == "__main__":
    sys.exit(main())
