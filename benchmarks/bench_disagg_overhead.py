"""What the fence costs: time to first token through SuiteNixlConnector beside vLLM's own NixlConnector.

One prefill and one decode engine run in two processes; the time to first token is the prefill (one token) plus the
decode side's pull and first token, with no HTTP between. Three kinds take turns, each pair started anew in every
round, because two engines are what two cores hold:

    suite         SuiteNixlConnector
    stock         NixlConnector: its progress thread spins and the model's thread is pinned to the last core
    stock_quiet   NixlConnector with those two repaired and nothing else, so that only the fence differs from suite

A pair of engines can prefill a quarter faster or slower than the next one of the same kind (cause not known), which
is more than the fence costs. So every prompt is also computed by the prefill engine without any connector parameters
just before, and the hand-off is the time to first token less that. The overhead compares hand-offs: (suite's - the
other's) / the other's time to first token. The plain ratio is given too.

    python benchmarks/bench_disagg_overhead.py [--rounds 4] [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import types
from pathlib import Path
from typing import Any

from common import arguments, positive, scratch, show_table, spread, transfer_config, write_result

TARGET_OVERHEAD = 0.03
TARGET_TOKENS = 1000
KINDS = {"suite": "SuiteNixlConnector", "stock": "NixlConnector", "stock_quiet": "QuietNixlConnector"}
STAGES = ("plain_ms", "prefill_ms", "decode_ms", "ttft_ms", "handoff_ms")

Samples = dict[tuple[str, int], list[list[dict[str, float]]]]


def run_pair(kind: str, turn: int, args: argparse.Namespace, model: Path) -> dict[int, list[dict[str, float]]]:
    """Start a pair, and time the chain for every prompt length. Milliseconds, by prompt length."""
    from pd import Spec, engines, prompt

    specs = [
        Spec(name, model, llm={"kv_transfer_config": transfer_config(KINDS[kind], role)})
        for name, role in (("p", "kv_producer"), ("d", "kv_consumer"))
    ]
    taken: dict[int, list[dict[str, float]]] = {tokens: [] for tokens in args.tokens}
    with engines(*specs) as (p, d):
        for tokens in args.tokens:
            for sample in range(args.samples + 2):  # the first two warm up and make the handshake
                text = prompt(tokens, 1000 * turn + sample)
                plain = p.generate(text, None, 1)
                first = p.generate(text, {"do_remote_decode": True, "do_remote_prefill": False}, 1)
                second = d.generate(text, first.kv, 1)
                if second.tokens != plain.tokens:
                    raise RuntimeError(f"{kind}: a pulled prompt of {tokens} tokens gave another token")
                if sample >= 2:
                    one = {"prefill_ms": 1e3 * first.seconds, "decode_ms": 1e3 * second.seconds}
                    one["plain_ms"] = 1e3 * plain.seconds
                    one["ttft_ms"] = one["prefill_ms"] + one["decode_ms"]
                    one["handoff_ms"] = one["ttft_ms"] - one["plain_ms"]
                    taken[tokens].append(one)
        if kind == "suite":
            pulls = d.metric("vllm_suite_kv_pulls_total", outcome="ok")
            if pulls != len(args.tokens) * (args.samples + 2):
                raise RuntimeError(f"only {pulls:.0f} pulls were answered by pulled blocks")
    return taken


def fence_costs(args: argparse.Namespace, model: Path) -> dict[str, dict[str, float]]:
    """The fence's own steps, alone: microseconds each."""
    from pd import Spec, engines, prompt

    costs: dict[str, list[float]] = {}
    specs = [
        Spec(name, model, llm={"kv_transfer_config": transfer_config("SuiteNixlConnector", role)})
        for name, role in (("p", "kv_producer"), ("d", "kv_consumer"))
    ]
    with engines(*specs) as (p, d):
        for sample in range(args.samples + 1):
            text = prompt(max(args.tokens), 500 + sample)
            kv = p.prefill(text)
            steps = d.call(_time_fence, kv, text)
            for name, seconds in steps.items():
                if sample:
                    costs.setdefault(name, []).append(1e6 * seconds)
    return {name: spread(values) for name, values in costs.items()}


def _time_fence(llm: Any, kv: dict[str, Any], text: list[int]) -> dict[str, float]:
    """In the decode process: digest of the prompt, checks of the reference, and a claim with its answer."""
    from child import scheduler

    from vllm_disagg.fence import content_digest
    from vllm_suite.handoff import Refusal

    half = scheduler(llm).connector.connector_scheduler
    request = types.SimpleNamespace(prompt_token_ids=text, mm_features=None, lora_request=None, cache_salt=None)
    marks = [time.perf_counter()]
    content = content_digest(request)
    marks.append(time.perf_counter())
    ref = half._view.check(kv, content, len(text) - 1)
    marks.append(time.perf_counter())
    if isinstance(ref, Refusal):
        raise RuntimeError(f"refused: {ref}")
    half._claims.start("bench", ref)
    claim = half._claims.get("bench")
    if not claim.answered.wait(5.0) or claim.refusal is not None:
        raise RuntimeError(f"not granted: {claim.refusal}")
    marks.append(time.perf_counter())
    half._claims.finish("bench", pulled=False)
    return {"digest_us": marks[1] - marks[0], "check_us": marks[2] - marks[1], "claim_us": marks[3] - marks[2]}


def summarise(samples: Samples, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per prompt length: each kind's times, and suite against both others."""
    rows = []
    for tokens in args.tokens:
        row: dict[str, Any] = {"tokens": tokens, "kinds": {}}
        for kind in KINDS:
            flat = [one for turn in samples[kind, tokens] for one in turn]
            row["kinds"][kind] = {stage: spread([one[stage] for one in flat]) for stage in STAGES}
        suite = {stage: row["kinds"]["suite"][stage]["median"] for stage in STAGES}
        for other in ("stock", "stock_quiet"):
            base = {stage: row["kinds"][other][stage]["median"] for stage in STAGES}
            row[f"added_ms_to_{other}"] = suite["handoff_ms"] - base["handoff_ms"]
            row[f"overhead_to_{other}"] = row[f"added_ms_to_{other}"] / base["ttft_ms"]
            row[f"ttft_ratio_to_{other}"] = suite["ttft_ms"] / base["ttft_ms"]
            rounds = zip(samples["suite", tokens], samples[other, tokens], strict=True)
            row[f"ttft_ratio_to_{other}_by_round"] = [_median_ttft(a) / _median_ttft(b) for a, b in rounds]
        rows.append(row)
    return rows


def _median_ttft(turn: list[dict[str, float]]) -> float:
    return statistics.median(one["ttft_ms"] for one in turn)


def show(rows: list[dict[str, Any]], costs: dict[str, dict[str, float]]) -> None:
    """The tables."""
    table = []
    for row in rows:
        for kind, stages in row["kinds"].items():
            cells = [f"{stages[stage]['median']:.1f} ({stages[stage]['min']:.1f})" for stage in STAGES]
            against = "" if kind == "suite" else f"{row[f'overhead_to_{kind}']:+.1%}"
            added = "" if kind == "suite" else f"{row[f'added_ms_to_{kind}']:+.1f}"
            ratio = "" if kind == "suite" else f"{row[f'ttft_ratio_to_{kind}']:.2f}"
            table.append([str(row["tokens"]), kind, *cells, added, against, ratio])
    columns = ["tokens", "kind", "plain ms", "prefill ms", "decode ms", "TTFT ms", "hand-off ms"]
    columns += ["suite adds ms", "of TTFT", "TTFT ratio"]
    show_table("time to first token, median (minimum)", columns, table)
    steps = [[name, f"{cost['median']:.0f}", f"{cost['p75']:.0f}"] for name, cost in costs.items()]
    show_table("steps of the fence, microseconds", ["step", "median", "p75"], steps)


def targets(rows: list[dict[str, Any]]) -> dict[str, bool | None]:
    """Whether suite stays within 3 % at 1,000 tokens; None where that length was not measured."""
    row = next((row for row in rows if row["tokens"] == TARGET_TOKENS), None)
    return {
        f"ttft_within_3_percent_of_{other}_at_1000_tokens": None
        if row is None
        else row[f"overhead_to_{other}"] <= TARGET_OVERHEAD
        for other in ("stock", "stock_quiet")
    }


def lengths(text: str) -> list[int]:
    """Argument type: prompt lengths in tokens, at most 2000."""
    result = sorted({positive(part) for part in text.split(",")})
    if result[-1] > 2000:
        raise argparse.ArgumentTypeError("a prompt can have at most 2000 tokens here")
    return result


def main() -> int:
    """Command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=positive, default=4, help="pairs of each kind")
    parser.add_argument("--samples", type=positive, default=12, help="requests per length and pair")
    parser.add_argument("--tokens", type=lengths, default=[100, 1000], metavar="LIST")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.samples = 1, 3
    from vllm_suite.fleet.tiny import TinyConfig, make_tiny_model

    load = os.getloadavg()
    config = TinyConfig(layers=8, hidden_size=512, intermediate_size=2048, heads=8, kv_heads=4, head_dim=64)
    samples: Samples = {(kind, tokens): [] for kind in KINDS for tokens in args.tokens}
    with scratch("bench-overhead-") as folder:
        model = make_tiny_model(folder / "model", config)
        for turn in range(args.rounds):
            kinds = list(KINDS)
            for kind in kinds[turn % 3 :] + kinds[: turn % 3]:
                for tokens, taken in run_pair(kind, turn, args, model).items():
                    samples[kind, tokens].append(taken)
        costs = fence_costs(args, model)
    rows = summarise(samples, args)
    held = targets(rows)
    show(rows, costs)
    for name, value in held.items():
        print(f"{name}: {'not measured' if value is None else 'yes' if value else 'NO'}")
    settings = {"rounds": args.rounds, "samples": args.samples, "model": vars(config), "quick": args.quick}
    result = {"settings": settings, "rows": rows, "fence_us": costs, "targets": held}
    write_result(args.json, "disagg_overhead", result, load)
    return 0


if __name__ == "__main__":
    sys.exit(main())
