"""What each fault does to vLLM's NixlConnector and to SuiteNixlConnector, measured in one run.

    --part engines   two in-process engines a kind: dead, frozen and late peers, tampered references, a taken port
    --part serve     one real `vllm serve` a kind: CPU time of each process, idle and with an unpulled prefill

Faults come from outside: processes are killed or stopped, leases run out, references are edited. One stop is timed by
a hook in the decode worker, which sends the signal just before a read. Both kinds recompute on failure
(``kv_load_failure_policy``) and have the same lease; whatever else is default.

    python benchmarks/bench_stock_faults.py --part engines|serve [--json FILE] [--quick]
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from common import arguments, scratch, show_table, transfer_config, write_result

KINDS = {"stock": "NixlConnector", "suite": "SuiteNixlConnector"}
LEASE_S = 3
FROZEN_WAIT_S = 15.0
START_WAIT_S = 30.0
ANSWER_WAIT_S = 40.0

# A fault's outcome: what a person reads, and the figures behind it.
Outcome = dict[str, Any]


def run_engines(kind: str, model: Path) -> dict[str, Outcome]:
    """All faults that in-process engines show, in an order that keeps the decode engine usable to the end."""
    from pd import Engine, Spec, engines, prompt

    def spec(name: str, role: str) -> Spec:
        extra = {"kv_lease_duration": LEASE_S}
        return Spec(name, model, llm={"kv_transfer_config": transfer_config(KINDS[kind], role, extra)})

    outcomes: dict[str, Outcome] = {}
    text, other = prompt(300, 1), prompt(300, 2)
    with engines(spec("d", "kv_consumer"), spec("p0", "kv_producer")) as (d, p0):
        outcomes["cores the model's thread may use"] = _cores(d)
        alone = d.generate(text).tokens
        references = [p0.prefill(text) for _ in range(2)]
        p0.kill()
        p0.process.join(10)
        tries = [attempt(d, text, kv, alone) for kv in references]
        outcomes["producer killed before any handshake, two requests"] = {
            "text": " then ".join(one["text"] for one in tries),
            "tries": tries,
        }
        outcomes["producer frozen between handshake and first read"] = frozen_at_first_read(
            Engine(spec("p1", "kv_producer")), d, text, alone
        )
        p = Engine(spec("p", "kv_producer"))
        try:
            p.wait_ready()
            outcomes["healthy pair"] = attempt(d, text, p.prefill(text), alone)
            kv, neighbour = p.prefill(text), p.prefill(other)
            kv["remote_block_ids"] = neighbour["remote_block_ids"]
            outcomes["block ids of another prompt"] = attempt(d, text, kv, alone)
            outcomes["pull after the lease, blocks reused"] = late_pull(p, d)
            outcomes["producer frozen after its prefill, connected before"] = frozen(p, d, text, alone)
            kv = p.prefill(text)
            kv["remote_block_ids"] = [[10**6 for _ in kv["remote_block_ids"][0]]]
            outcomes["block ids out of range"] = attempt(d, text, kv, alone)
            if outcomes["block ids out of range"]["pending"]:
                outcomes["the engine afterwards"] = {"text": "busy with that request"}
            else:
                outcomes["the engine afterwards"] = attempt(d, text, None, alone)
        finally:
            p.close()
    outcomes["side-channel port taken"] = taken_port(spec("p", "kv_producer"))
    return outcomes


def attempt(d: Any, text: list[int], kv: dict[str, Any] | None, alone: list[int], wait_s: float = 15.0) -> Outcome:
    """Decode with a reference and say what came, or that nothing came in ``wait_s``."""
    pulls = d.metric("vllm:nixl_xfer_time_seconds_count")
    begun = time.perf_counter()
    d.send("generate", text, kv, 8)
    try:
        result = d.receive(wait_s)
    except TimeoutError:
        return {"text": f"pending after {wait_s:.0f} s", "pending": True}
    except (RuntimeError, EOFError) as error:
        return {"text": "engine raised: " + str(error).strip().splitlines()[-1][:80], "pending": False}
    seconds = time.perf_counter() - begun
    good = result.tokens == alone
    answer = "right tokens" if good else "WRONG TOKENS" if result.finish_reason == "length" else "no answer"
    pulled = d.metric("vllm:nixl_xfer_time_seconds_count") > pulls
    text_out = f"{answer}, {'pulled' if pulled else 'computed'}, {seconds:.2f} s"
    figures = {"seconds": seconds, "right": good, "pulled": pulled, "finish": result.finish_reason}
    return {"text": text_out, **figures, "pending": False}


def late_pull(p: Any, d: Any) -> Outcome:
    """Let the lease run out, give the blocks to other prompts, then pull."""
    from pd import prompt

    text = prompt(1500, 17)
    alone = d.generate(text).tokens
    kv = p.prefill(text)
    time.sleep(LEASE_S + 1.5)
    for seed in range(3):
        p.generate(prompt(1500, 900 + seed))
    return attempt(d, text, kv, alone)


def frozen(p: Any, d: Any, text: list[int], alone: list[int]) -> Outcome:
    """Stop the producer's process after its answer, and let it go on when the wait is over."""
    kv = p.prefill(text)
    p.kill(signal.SIGSTOP)
    try:
        outcome = attempt(d, text, kv, alone, FROZEN_WAIT_S)
    finally:
        p.kill(signal.SIGCONT)
    if outcome["pending"]:
        begun = time.perf_counter()
        d.receive(ANSWER_WAIT_S)
        outcome["seconds_after_continue"] = time.perf_counter() - begun
        outcome["text"] += "; answered once it was continued"
    return outcome


def frozen_at_first_read(p: Any, d: Any, text: list[int], alone: list[int]) -> Outcome:
    """Stop a producer whose handshake has just ended, so that the first connection for data finds it stopped."""
    try:
        p.wait_ready()
        kv = p.prefill(text)
        d.call(_stop_before_read, p.process.pid)
        outcome = attempt(d, text, kv, alone, FROZEN_WAIT_S)
        p.kill(signal.SIGCONT)
        if outcome["pending"]:
            begun = time.perf_counter()
            d.receive(ANSWER_WAIT_S)
            outcome["seconds_after_continue"] = time.perf_counter() - begun
    finally:
        p.close()
    return outcome


def _stop_before_read(llm: Any, pid: int) -> None:
    """In the decode process: at the first read from a peer whose handshake is done, stop ``pid``."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    half = get_kv_transfer_group().connector_worker
    original = half._read_blocks

    def stop_first(*args: Any, **kwargs: Any) -> Any:
        half._read_blocks = original
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.05)
        return original(*args, **kwargs)

    half._read_blocks = stop_first


def taken_port(spec: Any) -> Outcome:
    """Start an engine whose side-channel port somebody listens on."""
    from pd import Engine

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        spec.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(taken.getsockname()[1])
        begun = time.perf_counter()
        engine = Engine(spec)
        try:
            if not engine.pipe.poll(START_WAIT_S):
                return {"text": f"hangs: no start and no error in {START_WAIT_S:.0f} s", "hangs": True}
            answer = str(engine.pipe.recv()).strip().splitlines()[-1]
        finally:
            engine.close()
    seconds = time.perf_counter() - begun
    return {"text": f"error in {seconds:.1f} s: {answer[:100]}", "hangs": False, "seconds": seconds, "message": answer}


def _cores(engine: Any) -> Outcome:
    mine, all_cores = engine.call(_affinity), len(os.sched_getaffinity(0))
    return {"text": f"{len(mine)} of {all_cores}", "cores": mine, "of": all_cores}


def _affinity(llm: Any) -> list[int]:
    return sorted(os.sched_getaffinity(0))


def main() -> int:
    """Command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--part", choices=("engines", "serve"), default="engines")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each CPU measurement (serve)")
    args = parser.parse_args()
    if args.seconds <= 0:
        parser.error("--seconds must be positive")
    if args.quick:
        args.seconds = 3.0
    from vllm_suite.fleet.tiny import make_tiny_model

    load = os.getloadavg()
    outcomes: dict[str, dict[str, Outcome]] = {}
    with scratch("bench-faults-") as folder:
        model = make_tiny_model(folder / "model")
        for kind, connector in KINDS.items():
            if args.part == "engines":
                outcomes[kind] = run_engines(kind, model)
            else:
                from serve_cpu import run_serve

                config = transfer_config(connector, "kv_producer")
                outcomes[kind] = run_serve(kind, model, config, folder, args.seconds)
    rows: list[dict[str, Any]] = [
        {"fault": fault, "stock": outcomes["stock"].get(fault), "suite": outcomes["suite"].get(fault)}
        for fault in {**outcomes["stock"], **outcomes["suite"]}
    ]
    cells = [[row["fault"], *((row[k] or {"text": ""})["text"] for k in KINDS)] for row in rows]
    show_table("faults", ["fault", "NixlConnector", "SuiteNixlConnector"], cells)
    settings = {"part": args.part, "lease_s": LEASE_S, "seconds": args.seconds, "quick": args.quick}
    write_result(args.json, "stock_faults", {"settings": settings, "rows": rows}, load)
    return 0


if __name__ == "__main__":
    sys.exit(main())
