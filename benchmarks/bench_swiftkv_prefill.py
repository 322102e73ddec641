"""What the skip gives: prefill throughput, TTFT and TPOT of a SwiftKV model and of the ordinary one of its shape.

Kinds, each an engine in a process of its own with random weights and equal settings, prefix caching off:

    base        plain Llama on vLLM's own class
    off         its SwiftKV form, skip not armed: every layer computes every token
    armed       its SwiftKV form, prompt tokens stop at the cut
    armed gN    armed, groups of N late layers share one K and V (AcrossKV)

All engines live at once and take turns, one request each in every round; a ratio is the median of the rounds' own
ratios, so that load which lasts longer than a round cancels out. Beside wall time stands the CPU time of the engine's
process (use --threads 1 for it: several threads spin while they wait for each other). Throughput is that of as many
prompts at once as fill one step. TPOT is compared in short turns, some decode steps each, since a request's decoding
is long enough for the load to change: one turn forth and the next back through the engines, in several rounds with
requests of their own, and in several starts, since engines of one kind differ from start to start. The medians of
rounds and starts stand beside the pooled one.

Beside a speed-up stands its bound 1 / (1 - s * (1 - KV / (g * F))), from the FLOPs of a prompt token with attention.

    python benchmarks/bench_swiftkv_prefill.py [--lengths 128,512,2000] [--chunk 512] [--groups 1,4] [--json FILE]
    python benchmarks/bench_swiftkv_prefill.py --shape 8b --lengths 2048,8192 --output-tokens 128     (one 80 GB GPU)
    python benchmarks/bench_swiftkv_prefill.py --shape 70b-tp4 --kinds base,armed --lengths 8192      (four GPUs)
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from common import arguments, positive, scratch, show_table, spread, write_result
from swiftkv_engines import Engine, Spec, Timing, engines
from swiftkv_shapes import PRESETS, Shape, bound

TARGET_TOKENS, TARGET_OF_BOUND, TARGET_TPOT = 2000, 0.85, 0.03
GPU_TARGETS = {"prefill": 1.75, "ttft": 1.6}  # at 8,192 tokens on the 8B shape
KINDS = ("base", "off", "armed")
MAX_SEQS = 32
STEPS_OF_A_TURN = 4
SIZES = ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab")

Rounds = dict[str, list[Timing]]
Turns = dict[str, list[tuple[float, float]]]


def kinds_of(names: list[str], groups: list[int]) -> dict[str, tuple[bool | None, int]]:
    """Name of each engine to its skip (None: the ordinary model) and its group size."""
    kinds: dict[str, tuple[bool | None, int]] = {}
    for name in names:
        if name == "armed":
            kinds |= {"armed" if group == 1 else f"armed g{group}": (True, group) for group in groups}
        else:
            kinds[name] = (None, 1) if name == "base" else (False, 1)
    return kinds


def specs_of(args: argparse.Namespace, step_tokens: int) -> list[Spec]:
    """One engine per kind, for steps of at most ``step_tokens`` tokens."""
    shape: Shape = args.shape
    outputs = max(args.output_tokens, decoded_in_turns(args))
    longest = max(args.lengths) + outputs
    kinds = kinds_of(args.kinds, args.groups)
    width = 4 if args.dtype == "float32" else 2
    held = max(step_tokens, max(args.lengths)) + MAX_SEQS * (outputs + args.block_size)
    options: dict[str, Any] = {
        "dtype": args.dtype,
        "enforce_eager": args.eager,
        "max_model_len": longest,
        "max_num_batched_tokens": step_tokens,
        "max_num_seqs": MAX_SEQS,
        "block_size": args.block_size,
        "kv_cache_memory_bytes": int(1.1 * shape.kv_values_per_token * width / shape.tp * held) + (64 << 20),
        "gpu_memory_utilization": 0.9 / len(kinds),
        "tensor_parallel_size": shape.tp,
    }
    return [
        Spec(
            name,
            shape.hf_config(args.dtype, longest, None if skip is None else args.cut_layer, group),
            skip,
            args.threads,
            options,
        )
        for name, (skip, group) in kinds.items()
    ]


def take_turns(
    alive: dict[str, Engine], args: argparse.Namespace, tokens: int, count: int, outputs: int, rounds: int
) -> Rounds:
    """``count`` prompts at once per engine and round; equal prompts for all engines, the order rotates."""
    taken: Rounds = {name: [] for name in alive}
    names = list(alive)
    for turn in range(rounds + 1):  # the first one warms up
        rng = random.Random(f"{tokens} {count} {turn}")
        prompts = [[rng.randrange(2, args.shape.vocab) for _ in range(tokens)] for _ in range(count)]
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            timing = alive[name].run(prompts, outputs)
            if turn:
                taken[name].append(timing)
    return taken


def decode_in_turns(alive: dict[str, Engine], args: argparse.Namespace, tokens: int) -> Turns:
    """Wall and CPU seconds of a decode step, turn by turn; in each round every engine decodes a request of its own.

    Equal numbers of turns go forth and back through the engines, so that none is always the one after another.
    """
    names = list(alive)
    taken: Turns = {name: [] for name in names}
    for number in range(args.decode_rounds):
        rng = random.Random(f"{tokens} {number}")
        prompt = [rng.randrange(2, args.shape.vocab) for _ in range(tokens)]
        for engine in alive.values():
            engine.open(prompt, decoded_in_turns(args))
        for turn in range(args.turns + 1):  # the first one warms up
            for name in names if (turn + number) % 2 else names[::-1]:
                one = alive[name].steps(STEPS_OF_A_TURN)
                if turn:
                    taken[name].append(one)
        for engine in alive.values():
            engine.end()
    return taken


def decoded_in_turns(args: argparse.Namespace) -> int:
    """Tokens that a round of `decode_in_turns` takes at most."""
    turns: int = args.turns
    return (turns + 2) * (STEPS_OF_A_TURN + 1)


def check_skip(alive: dict[str, Engine]) -> dict[str, dict[str, int]]:
    """The plugin's counters of armed engines; RuntimeError where the tail computed more than the sampled rows.

    The plugin counts nothing where the skip is not armed.
    """
    counted = {name: engine.counters() for name, engine in alive.items() if engine.spec.skip}
    for name, now in counted.items():
        decoded = now["head_tokens"] - now["prompt_tokens"]
        if not 0 < now["tail_rows"] - decoded <= MAX_SEQS * now["steps"] or now["tail_rows"] == now["head_tokens"]:
            raise RuntimeError(f"{name}: the tail computed {now['tail_rows']} rows of {now['head_tokens']}")
    return counted


def ratios(numerator: list[Timing], denominator: list[Timing], what: str) -> dict[str, float]:
    """Spread of the rounds' ratios of one field of `Timing`."""
    return spread([getattr(a, what) / getattr(b, what) for a, b in zip(numerator, denominator, strict=True)])


def summarise(
    single: Rounds, batch: Rounds | None, turns: Turns, args: argparse.Namespace, tokens: int, count: int
) -> list[dict[str, Any]]:
    """One row per kind for one prompt length."""
    rows = []
    kinds = kinds_of(args.kinds, args.groups)
    for name, timings in single.items():
        skip, group = kinds[name]
        row: dict[str, Any] = {"kind": name, "tokens": tokens}
        for key, what in (("ttft_ms", "prefill"), ("tpot_of_requests_ms", "decode")):
            row[key] = spread([1e3 * getattr(one, what) for one in timings])
        row["tpot_ms"] = spread([1e3 * wall for wall, _ in turns[name]])
        many = timings if batch is None else batch[name]
        row["prompts_at_once"] = count
        row["prefill_tokens_per_s"] = spread([count * tokens / one.prefill for one in many])
        row["bound"] = bound(args.shape, tokens, args.cut_layer, group) if skip else 1.0
        for other in ("base", "off"):
            if other not in single or other == name:
                continue
            versus: dict[str, Any] = {
                "ttft_speedup": ratios(single[other], timings, "prefill"),
                "ttft_speedup_cpu_time": ratios(single[other], timings, "prefill_cpu"),
                "throughput_speedup": ratios(single[other] if batch is None else batch[other], many, "prefill"),
            }
            for at, key in enumerate(("tpot_ratio", "tpot_ratio_cpu_time")):
                pairs = zip(turns[name], turns[other], strict=True)
                values = [mine[at] / theirs[at] for mine, theirs in pairs]
                versus[key] = spread(values)
                for part, count in (("round", args.turns), ("start", args.turns * args.decode_rounds)):
                    parts = [values[i : i + count] for i in range(0, len(values), count)]
                    versus[f"{key}_by_{part}"] = [statistics.median(one) for one in parts]
            versus["tpot_ratio_of_requests"] = ratios(timings, single[other], "decode")
            row[f"against_{other}"] = versus
        if "against_base" in row:
            row["of_bound"] = row["against_base"]["ttft_speedup"]["median"] / row["bound"]
            same = [a.tokens == b.tokens for a, b in zip(timings, single.get("off", timings), strict=True)]
            row["rounds_with_the_tokens_of_off"] = statistics.fmean(same)
        rows.append(row)
    return rows


def run_series(args: argparse.Namespace, folder: Path, step_tokens: int, lengths: list[int]) -> dict[str, Any]:
    """Start the engines, measure every length, and end them, ``args.starts`` times over; rounds are pooled.

    ``folder`` stays the same for all starts: the model's path is part of the key of vLLM's compilation cache.
    """
    counts = {tokens: max(1, min(MAX_SEQS, step_tokens // tokens)) for tokens in lengths}
    names = list(kinds_of(args.kinds, args.groups))
    single: dict[int, Rounds] = {tokens: {name: [] for name in names} for tokens in lengths}
    batch: dict[int, Rounds] = {tokens: {name: [] for name in names} for tokens in lengths}
    turns: dict[int, Turns] = {tokens: {name: [] for name in names} for tokens in lengths}
    counted = []
    for start in range(args.starts):
        with engines(specs_of(args, step_tokens), folder) as alive:
            for tokens, count in counts.items():
                _extend(single[tokens], take_turns(alive, args, tokens, 1, args.output_tokens, args.repeat))
                if count > 1:
                    _extend(batch[tokens], take_turns(alive, args, tokens, count, 1, (args.repeat + 1) // 2))
                _extend(turns[tokens], decode_in_turns(alive, args, tokens))
            if args.profile and start == 0:
                for name, engine in alive.items():
                    print(f"\n{name}\n{engine.profile([[2] * max(lengths)], args.output_tokens)}")
            counted.append(check_skip(alive))
    rows: list[dict[str, Any]] = []
    for tokens, count in counts.items():
        found = summarise(single[tokens], batch[tokens] if count > 1 else None, turns[tokens], args, tokens, count)
        show(f"{tokens} tokens, at most {step_tokens} in a step", found)
        rows += found
    return {"step_tokens": step_tokens, "rows": rows, "counters": counted}


def _extend(into: dict[str, list[Any]], more: dict[str, list[Any]]) -> None:
    for name, values in more.items():
        into[name] += values


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """The table of one prompt length."""

    def against(row: dict[str, Any], other: str, what: str) -> str:
        found = row.get(f"against_{other}", {}).get(what)
        return f"{found['median']:.3f} ({found['p25']:.3f}-{found['p75']:.3f})" if found else ""

    columns = ["kind", "TTFT ms", "TPOT ms", "prefill tok/s", "TTFT x base", "(CPU time)", "x off", "bound", "of bound"]
    columns += ["tok/s x base", "TPOT / base", "(CPU time)", "rounds", "starts"]
    table = []
    for row in rows:
        cells = [row["kind"], *(f"{row[key]['median']:.2f}" for key in ("ttft_ms", "tpot_ms"))]
        cells.append(f"{row['prefill_tokens_per_s']['median']:.0f}")
        cells += [against(row, "base", "ttft_speedup"), against(row, "base", "ttft_speedup_cpu_time")]
        cells += [against(row, "off", "ttft_speedup"), f"{row['bound']:.3f}"]
        cells += [f"{row['of_bound']:.1%}" if "of_bound" in row else "", against(row, "base", "throughput_speedup")]
        cells += [against(row, "base", "tpot_ratio"), against(row, "base", "tpot_ratio_cpu_time")]
        for part in ("round", "start"):
            medians = row.get("against_base", {}).get(f"tpot_ratio_by_{part}")
            cells.append(f"{min(medians):.3f}-{max(medians):.3f}" if medians else "")
        table.append(cells)
    show_table(f"{title}: medians (quartiles of ratios); medians of TPOT's rounds and starts", columns, table)


def targets(rows: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, bool | None]:
    """The issue's targets for this shape; None where what they need was not measured."""
    armed = {row["tokens"]: row for row in rows if row["kind"] == "armed" and "against_base" in row}
    held: dict[str, bool | None] = {}
    if args.shape == PRESETS["8b"]:
        row = armed.get(8192)
        for name, what in (("prefill", "throughput_speedup"), ("ttft", "ttft_speedup")):
            goal = GPU_TARGETS[name]
            reached = None if row is None else bool(row["against_base"][what]["median"] >= goal)
            held[f"{name}_{goal}_times_base_at_8192_tokens"] = reached
    else:
        row = armed.get(TARGET_TOKENS)
        reached = None if row is None else bool(row["of_bound"] >= TARGET_OF_BOUND)
        held["85_percent_of_the_bound_at_2000_tokens"] = reached
    for tokens, row in armed.items():
        ratio = row["against_base"]["tpot_ratio"]["median"]
        held[f"tpot_at_most_3_percent_above_base_at_{tokens}_tokens"] = bool(ratio - 1 <= TARGET_TPOT)
    return held


def numbers(text: str) -> list[int]:
    """Argument type: positive integers, comma-separated."""
    return sorted({positive(part) for part in text.split(",")})


def kind_names(text: str) -> list[str]:
    """Argument type: some of base, off, armed."""
    names = text.split(",")
    if len(set(names)) != len(names) or not set(names) <= set(KINDS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(KINDS)}")
    return sorted(names, key=KINDS.index)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments with ``shape`` as a `Shape` and ``cut_layer``; exits 2 where they do not fit together."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--shape", choices=PRESETS, default="125m", help="preset; the next options change it")
    for size in (*SIZES, "tp"):
        parser.add_argument(f"--{size.replace('_', '-')}", type=positive, metavar="N")
    parser.add_argument("--cut", type=float, default=0.5, help="share of layers that prompt tokens skip")
    parser.add_argument(
        "--kinds", type=kind_names, default=["base", "armed"], metavar="LIST", help="of " + ", ".join(KINDS)
    )
    parser.add_argument("--groups", type=numbers, default=[1], metavar="LIST", help="AcrossKV group sizes")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--lengths", type=numbers, default=[128, 512, 2000], metavar="LIST", help="prompt tokens")
    parser.add_argument("--output-tokens", type=positive, default=17, metavar="N", help="per request")
    parser.add_argument("--chunk", type=positive, metavar="N", help="a second series with N tokens in a step")
    parser.add_argument("--repeat", type=positive, default=4, help="rounds per length and start")
    parser.add_argument("--starts", type=positive, default=2, help="of all engines; see TPOT in the README")
    parser.add_argument("--decode-rounds", type=positive, default=4, help="of TPOT, per length and start")
    parser.add_argument("--turns", type=positive, default=16, help="of decoding, per round")
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)), help="of an engine, on CPU")
    parser.add_argument("--block-size", type=positive, default=32, help="of the KV cache")
    parser.add_argument("--eager", action="store_true", help="no torch.compile and no CUDA graphs")
    parser.add_argument("--profile", action="store_true", help="also print torch's profile of the longest prompt")
    args = parser.parse_args(argv)
    if args.quick:
        args.repeat, args.decode_rounds, args.turns, args.starts, args.chunk = 2, 2, 4, 1, None
        args.lengths, args.groups = args.lengths[:2], args.groups[:1]
    changed = {size: getattr(args, size) for size in (*SIZES, "tp") if getattr(args, size) is not None}
    try:
        args.shape = dataclasses.replace(PRESETS[args.shape], **changed)
        args.cut_layer = args.shape.layers - round(args.cut * args.shape.layers)
        for group in args.groups:
            bound(args.shape, args.lengths[0], args.cut_layer, group)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> int:
    """Command line."""
    args = parse()
    load = os.getloadavg()
    shape: Shape = args.shape
    print(f"{shape.parameters / 1e6:.0f} M parameters, {shape.layers} layers, cut at {args.cut_layer}, {args.dtype}")
    with scratch("bench-swiftkv-") as folder:
        series = [run_series(args, folder, max(args.lengths), args.lengths)]
        longer = [tokens for tokens in args.lengths if args.chunk and tokens > args.chunk]
        if longer:
            series.append(run_series(args, folder, args.chunk, longer))
    held = targets(series[0]["rows"], args)
    for name, value in held.items():
        print(f"{name}: {'not measured' if value is None else 'yes' if value else 'NO'}")
    settings = {name: value for name, value in vars(args).items() if name not in (*SIZES, "tp", "json", "shape")}
    settings["shape"] = dataclasses.asdict(shape) | {"parameters": shape.parameters}
    write_result(args.json, "swiftkv_prefill", {"settings": settings, "series": series, "targets": held}, load)
    return 0


if __name__ == "__main__":
    sys.exit(main())
