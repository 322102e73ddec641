"""Encoding on instances of its own: TTFT, throughput and encode time against images per request, on CPU.

Kinds, all alive at once and taking turns, so that other work on the machine hits them alike:

    monolithic   one plain `vllm serve`
    E+PD         one encoder, and one instance that prefills and decodes
    1E+P+D       one encoder, one prefill and one decode instance
    2E+P+D       the same with two encoders, between which the router shares the images of a request

The model is a tiny Qwen2.5-VL whose encoder is most of the work. In every round each kind gets the same images, new
to every cache, as one request alone (TTFT), then the same images after another text (cached), then several requests
at once (throughput). Every answer is compared with the monolithic one's. Encode time is what the router saw requests
spend in its encode stage; transfer and fence are the consumers' fetches, from claim to checked bytes, added up over
items although they overlap.

Two encoders can be faster than one only on two free cores: rounds in which fewer were idle just before are left out
of that target. Beside it stands the same ratio in CPU time of the busiest encoder, which other work does not change
much: 2 would be a perfect split that costs nothing.

    python benchmarks/bench_epd.py [--images 1,2,4,8] [--rounds 3] [--json FILE] [--plot FILE.svg] [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import arguments, positive, scratch, show_table, spread, write_result
from epd_fleet import KINDS, Systems, encoders_of, idle_cores, systems
from svg_plot import Panel, write_svg

from vllm_suite.fleet.demo_epd_report import settled
from vllm_suite.fleet.demo_epd_spec import TOWER
from vllm_suite.fleet.demo_pictures import picture_request
from vllm_suite.fleet.demo_spec import SERVED_NAME
from vllm_suite.fleet.pictures_parts import image_part
from vllm_suite.fleet.replay import Answer, Request, send

if TYPE_CHECKING:
    import aiohttp

TARGET_SPEEDUP, TARGET_SHARE, FREE_CORES = 1.7, 0.05, 1.8
OUTPUT_TOKENS = 8
Sample = dict[str, Any]


def fresh(request: Request, index: int, life: str) -> Request:
    """The same request, its images new to every cache: by the salt for the router, by their names for plain vLLM."""
    (message,) = request.body["messages"]
    parts = [
        part if part["type"] == "text" else {**part, "uuid": f"{life}-{position}"}
        for position, part in enumerate(message["content"])
    ]
    body = {**request.body, "messages": [{**message, "content": parts}], "cache_salt": life}
    return Request(index, 0.0, request.path, body)


async def measure(at: Systems, session: aiohttp.ClientSession, kind: str, images: int, turn: int, burst: int) -> Sample:
    """One kind's turn. Raises RuntimeError where a request fails or a cached image is encoded again."""
    draw = random.Random(images)
    shown = [image_part(336, 336, 100 * images + i) for i in range(images)]
    asked = picture_request(OUTPUT_TOKENS, 0, shown, draw)
    other = picture_request(OUTPUT_TOKENS, 1, shown, draw)
    life = f"{kind}-{images}-{turn}"

    async def go(requests: list[Request]) -> list[Answer]:
        answers = await send(at.urls[kind], requests, OUTPUT_TOKENS)
        failed = [answer.error for answer in answers if answer.error]
        if failed:
            raise RuntimeError(f"{kind}, {images} images: {failed[0]}")
        return answers

    free = idle_cores()
    before, busy = await settled(lambda: at.counts(session), 0.1), at.cpu_s()
    (alone,) = await go([fresh(asked, 0, life)])
    busy = {name: seconds - busy[name] for name, seconds in at.cpu_s().items()}
    after = await settled(lambda: at.counts(session), 0.1)
    # Other words around the same images, which keep their places and so their names: nothing of the prompt's KV can
    # be reused, only what the encoder made.
    (cached,) = await go([fresh(other, 1, life)])
    end = await settled(lambda: at.counts(session), 0.1)
    spent, second = after.since(before), end.since(after)
    if sum(second.encoded.values()):
        raise RuntimeError(f"{kind}, {images} images: a cached image was encoded again")
    if encoders_of(kind) and sum(spent.encoded.values()) != images:
        raise RuntimeError(f"{kind}: {dict(spent.encoded)} encoded, {images} expected; local: {dict(spent.local)}")
    began = time.perf_counter()
    answers = await go([fresh(asked, i, f"{life}-{i}") for i in range(burst)])
    took = time.perf_counter() - began
    return {
        "kind": kind,
        "images": images,
        "turn": turn,
        "idle_cores": free,
        "ttft_ms": alone.ttft_ms,
        "cached_ttft_ms": cached.ttft_ms,
        "requests_per_s": burst / took,
        "images_per_s": burst * images / took,
        "encode_ms": 1e3 * spent.stage_seconds if spent.stage_count else None,
        "encoder_cpu_ms": 1e3 * max(busy.values()),
        "fetch_ms": 1e3 * spent.fetch_seconds,
        "bytes": spent.fetched_bytes,
        "tokens": [alone.token_ids, cached.token_ids, *(answer.token_ids for answer in answers)],
    }


async def rounds(args: argparse.Namespace, folder: Path, model: Path) -> list[Sample]:
    """All turns. Raises RuntimeError where two kinds answer differently."""
    import aiohttp

    samples: list[Sample] = []
    async with systems(folder, model, max(args.images)) as at, aiohttp.ClientSession() as session:
        for kind in KINDS:  # opens the connections between the instances
            await measure(at, session, kind, min(args.images), -1, 1)
        for turn in range(args.rounds):
            for images in args.images:
                order = KINDS[turn % len(KINDS) :] + KINDS[: turn % len(KINDS)]
                found = [await measure(at, session, kind, images, turn, args.burst) for kind in order]
                answers = {sample["kind"]: sample.pop("tokens") for sample in found}
                wrong = [kind for kind, tokens in answers.items() if tokens != answers["monolithic"]]
                if wrong:
                    raise RuntimeError(f"{wrong} and one engine answer {images} images differently")
                samples += found
            print(f"round {turn + 1} of {args.rounds} done", flush=True)
    return samples


def summarise(samples: list[Sample], images: list[int]) -> list[dict[str, Any]]:
    """One row per kind and number of images: the spread of each quantity."""
    rows = []
    for count in images:
        for kind in KINDS:
            own = [sample for sample in samples if (sample["kind"], sample["images"]) == (kind, count)]
            row: dict[str, Any] = {"kind": kind, "images": count}
            for name in ("ttft_ms", "cached_ttft_ms", "requests_per_s", "images_per_s", "encode_ms", "encoder_cpu_ms",
                         "fetch_ms"):  # fmt: skip
                values = [sample[name] for sample in own if sample[name] is not None]
                row[name] = spread(values) if values else None
            row["bytes"] = own[0]["bytes"]
            rows.append(row)
    return rows


def targets(samples: list[Sample]) -> dict[str, Any]:
    """The three targets with what was found; `held` is None where it could not be measured."""
    most = max(sample["images"] for sample in samples)
    times = {(s["kind"], s["turn"]): s for s in samples if s["images"] == most and s["encode_ms"]}
    pairs = [(times["1E+P+D", turn], one) for (kind, turn), one in times.items() if kind == "2E+P+D"]
    free = [(a, b) for a, b in pairs if min(a["idle_cores"], b["idle_cores"]) >= FREE_CORES]
    speedup = statistics.median(a["encode_ms"] / b["encode_ms"] for a, b in free) if free and most > 1 else None
    loaded = statistics.median(a["encode_ms"] / b["encode_ms"] for a, b in pairs) if pairs else None
    cpu = statistics.median(a["encoder_cpu_ms"] / b["encoder_cpu_ms"] for a, b in pairs) if pairs else None
    encoded = [s for s in samples if s["encode_ms"]]
    share = sum(s["fetch_ms"] for s in encoded) / sum(s["encode_ms"] for s in encoded) if encoded else None
    return {
        "encode_speedup": {
            "images": most, "free_rounds": len(free), "on_free_cores": speedup, "all_rounds": loaded,
            "cpu_of_busiest_encoder": cpu,
            "held": None if speedup is None else speedup >= TARGET_SPEEDUP,
        },
        "transfer_and_fence_of_encode": {"share": share, "held": None if share is None else share <= TARGET_SHARE},
        "a_cached_image_is_not_encoded": {"held": True},  # `measure` raises otherwise
    }  # fmt: skip


def show(rows: list[dict[str, Any]], held: dict[str, Any]) -> None:
    """The tables."""
    names = ("ttft_ms", "cached_ttft_ms", "encode_ms", "fetch_ms", "requests_per_s", "images_per_s")
    table = []
    for row in rows:
        cells = [
            "" if row[name] is None else f"{row[name]['median']:.{2 if '_per_' in name else 1}f}" for name in names
        ]
        table.append([str(row["images"]), row["kind"], *cells, f"{row['bytes'] / 1e3:.0f}"])
    columns = ["images", "kind", "TTFT ms", "cached ms", "encode ms", "fetch ms", "requests/s", "images/s", "kB moved"]
    show_table("medians over the rounds", columns, table)
    for name, found in held.items():
        verdict = {None: "not measured", True: "yes", False: "NO"}[found["held"]]
        print(f"{name}: {verdict} { ({k: v for k, v in found.items() if k != 'held'} or '') }")


def plot(path: Path, rows: list[dict[str, Any]], images: list[int], caption: str) -> None:
    """TTFT, cached TTFT and throughput as an SVG file."""
    panels = []
    for name, title in (("ttft_ms", "TTFT, ms"), ("cached_ttft_ms", "TTFT, images cached, ms"),
                        ("images_per_s", "throughput, images/s")):  # fmt: skip
        lines = {kind: [row[name] and row[name]["median"] for row in rows if row["kind"] == kind] for kind in KINDS}
        panels.append(Panel(title, "images per request", images, lines))
    write_svg(path, panels, caption)


def counts(text: str) -> list[int]:
    """Argument type: numbers of images."""
    return sorted({positive(part) for part in text.split(",")})


def main() -> int:
    """Command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--images", type=counts, default=[1, 2, 4, 8], metavar="LIST", help="images per request")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--burst", type=positive, default=4, help="requests at once, for the throughput")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.svg", help="draw TTFT and throughput (default: beside --json)"
    )
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.images, args.burst = 1, args.images[:2], 2
    from vllm_suite.fleet.tiny_media import write

    load = os.getloadavg()
    with scratch("bench-epd-") as folder:
        model = write("qwen2_5_vl", folder / "model", **TOWER)
        samples = asyncio.run(rounds(args, folder / SERVED_NAME, model))
    rows, held = summarise(samples, args.images), targets(samples)
    show(rows, held)
    settings = {"rounds": args.rounds, "burst": args.burst, "tower": TOWER, "quick": args.quick, "image": [336, 336]}
    where = args.plot or (args.json.with_suffix(".svg") if args.json else None)
    if where is not None:
        plot(where, rows, args.images, f"medians of {args.rounds} rounds, {os.cpu_count()} cores, tiny Qwen2.5-VL")
        print(f"wrote {where}")
    result = {"settings": settings, "rows": rows, "samples": samples, "targets": held}
    write_result(args.json, "epd", result, load)
    return 0


if __name__ == "__main__":
    sys.exit(main())
