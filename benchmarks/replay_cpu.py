"""A short replay on a real engine, on CPU: does what the virtual clock shows hold where a model runs?

    python benchmarks/replay_cpu.py --trace servegen_r1_SAMPLED_5000.csv --requests 120 --json out.json

A tiny Llama runs in the process of its engine. Lengths of the trace are divided by `--shrink`. A logits processor ends
each request: it forbids EOS up to the recorded length and forces it there. It finds the length by the first tokens of
the prompt, which name the request; the scheduler is told one common `max_tokens`. The rate comes from the throughput of
the same engine with all requests at once. Times are of the wall clock, so other work on the machine shows in them;
policies take turns, and each turn is an engine of its own.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import arguments, positive, scratch, show_table, write_result
from replay_cases import CASES, STEPS, find_files, make_policy
from replay_engine import CLASS_ARGUMENT, EngineSettings
from replay_report import metrics
from replay_traces import Row
from replay_workload import Arrivals, Room, Source

ROOT = Path(__file__).resolve().parent.parent
FIRST_TOKEN, TOKENS = 16, 480
MAX_TOKENS = 512
BLOCK = 32
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "CUDA_VISIBLE_DEVICES": "",
}


def prompt_of(index: int, row: Row) -> list[int]:
    """A prompt of at least two tokens whose first two name the request."""
    name = [FIRST_TOKEN + index // TOKENS, FIRST_TOKEN + index % TOKENS]
    return name + [FIRST_TOKEN + (index * 31 + at) % TOKENS for at in range(row.prompt - 2)]


def serve(model: Path, rows: list[Row], policy: str, room: Room, answer: Any) -> None:
    """In a process of its own: serve `rows` in real time and send what came out."""
    os.environ.update(ENVIRONMENT)
    import torch

    torch.set_num_threads(1)
    import replay_eos
    from vllm import EngineArgs, LLMEngine, SamplingParams

    replay_eos.LENGTHS = {tuple(prompt_of(index, row)[:2]): row.output for index, row in enumerate(rows)}
    settings, client = make_policy(policy, EngineSettings(room=room))
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=str(model),
            max_model_len=1024,
            block_size=BLOCK,
            gpu_memory_utilization=0.05,
            num_gpu_blocks_override=room.blocks,
            max_num_seqs=room.seqs,
            enable_prefix_caching=False,
            enforce_eager=True,
            disable_log_stats=True,
            logits_processors=["replay_eos:EndAtLength"],
            scheduling_policy=settings.policy,  # type: ignore[arg-type]
            scheduler_cls=settings.scheduler_cls,
            additional_config=settings.additional,
        )
    )
    result: dict[str, Any] = {
        "latency": [0.0] * len(rows),
        "first_token": [0.0] * len(rows),
        "outputs": [0] * len(rows),
    }
    scheduler = engine.engine_core.engine_core.scheduler
    preempt, evictions = scheduler._preempt_request, [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        evictions[0] += 1
        return preempt(*args, **kwargs)

    scheduler._preempt_request = counted
    begin = time.time()
    added = done = steps = 0
    while done < len(rows):
        now = time.time() - begin
        while added < len(rows) and (rows[added].arrival_s or 0.0) <= now:
            row = rows[added]
            params = SamplingParams(
                temperature=0.0,
                max_tokens=MAX_TOKENS,
                extra_args={CLASS_ARGUMENT: row.label} if row.label else None,
                detokenize=False,
            )
            engine.add_request(
                str(added),
                {"prompt_token_ids": prompt_of(added, row)},
                params,
                arrival_time=begin + (row.arrival_s or 0.0),
                priority=client.priority(row) if client.priority else 0,
            )
            added += 1
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, (rows[added].arrival_s or 0.0) - (time.time() - begin)))
            continue
        steps += 1
        for output in engine.step():
            index = int(output.request_id)
            at = time.time() - begin - (rows[index].arrival_s or 0.0)
            count = len(output.outputs[0].token_ids)
            if count and not result["first_token"][index]:
                result["first_token"][index] = at
            if output.finished:
                result["latency"][index], result["outputs"][index] = at, count
                done += 1
                if client.finished:
                    client.finished(rows[index])
    span = time.time() - begin
    if result["outputs"] != [row.output for row in rows]:
        raise AssertionError("a request did not end at its recorded length")
    answer.send(
        {
            **result,
            "preemptions": evictions[0],
            "recomputed": 0,
            "overhead_s": 0.0,
            "steps": steps,
            "makespan": span,
            "busy": 1.0,
            "rate": (len(rows) - 1) / ((rows[-1].arrival_s or 0.0) or span),
        }
    )


def in_a_process(model: Path, rows: list[Row], policy: str, room: Room, limit_s: float) -> dict[str, Any]:
    """`serve` in a fresh process. Raises RuntimeError where it ends without an answer, or not in `limit_s`."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(model, rows, policy, room, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit_s):
            raise RuntimeError(f"{policy}: no result in {limit_s:.0f} s")
        result: dict[str, Any] = ours.recv()
        return result
    except EOFError:
        raise RuntimeError(f"{policy}: the engine's process ended without a result") from None
    finally:
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--trace", nargs="+", default=list(CASES[0].files), metavar="F")
    parser.add_argument("--requests", type=positive, default=120, metavar="N")
    parser.add_argument("--shrink", type=positive, default=24, help="lengths of the trace are divided by this")
    parser.add_argument("--load", type=float, default=1.3, help="share of the engine's own throughput")
    parser.add_argument("--seqs", type=positive, default=8)
    parser.add_argument("--blocks", type=positive, default=40, help=f"of {BLOCK} tokens")
    parser.add_argument("--policies", nargs="+", default=["fcfs", "ours"])
    parser.add_argument("--turns", type=positive, default=2)
    args = parser.parse_args(argv)
    load = os.getloadavg()
    os.environ.update(ENVIRONMENT)
    requests, turns = (24, 1) if args.quick else (args.requests, args.turns)
    data = Path(os.environ.get("VLLM_SUITE_DATA") or ROOT.parent / "shared" / "data")
    room = Room(args.blocks, args.seqs, BLOCK)
    try:
        source = Source(find_files(args.trace, data))
        drawn = source.draw(requests, 0, Arrivals(rate=1.0), room, STEPS)
        for policy in args.policies:
            make_policy(policy, EngineSettings(room=room))
    except (ValueError, FileNotFoundError) as error:
        print(f"replay_cpu: {error}", file=sys.stderr)
        return 2
    most = room.blocks * BLOCK // 2
    rows = [
        replace(
            row,
            prompt=min(max(2, row.prompt // args.shrink), most // 2),
            output=min(max(1, row.output // args.shrink), most // 2),
        )
        for row in drawn
    ]
    from vllm_suite.fleet.tiny import make_tiny_model

    results: dict[str, list[dict[str, Any]]] = {policy: [] for policy in args.policies}
    with scratch("replay-cpu-") as folder:
        model = make_tiny_model(folder / "model")
        at_once = in_a_process(model, [replace(row, arrival_s=0.0) for row in rows], "fcfs", room, 600)
        rate = args.load * len(rows) / at_once["makespan"]
        print(f"all at once: {at_once['makespan']:.1f} s; arrivals at {rate:.2f} requests per second", file=sys.stderr)
        timed = [replace(row, arrival_s=(row.arrival_s or 0.0) / rate) for row in rows]
        for turn in range(turns):
            for policy in args.policies:
                results[policy].append(in_a_process(model, timed, policy, room, 900))
                found = metrics(results[policy][-1])
                print(f"turn {turn}: {policy} " + json.dumps({k: round(found[k], 3) for k in ("mean", "p99", "max")}))
    names = ("mean", "p50", "p95", "p99", "max", "s_per_token", "preemptions")
    figures = {p: {n: statistics.fmean(metrics(r)[n] for r in each) for n in names} for p, each in results.items()}
    show_table(
        f"{requests} requests on a real engine, {turns} turns",
        ["policy", *names],
        [[policy, *(f"{found[name]:.3f}" for name in names)] for policy, found in figures.items()],
    )
    body = {"rate": rate, "room": vars(room), "shrink": args.shrink, "load": args.load, "figures": figures}
    each_turn = {policy: [metrics(result) for result in each] for policy, each in results.items()}
    write_result(args.json, "replay_cpu", {**body, "turns": each_turn}, load)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
