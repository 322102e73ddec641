"""From command-line arguments to a `Case`, with errors that say what, where and what to do."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

from vllm_suite.fleet.units import parse_duration_ms
from vllm_suite.planner.hardware import HardwareError, cluster
from vllm_suite.planner.models import Model, ModelError, load
from vllm_suite.planner.plan import PlanError, Slo
from vllm_suite.planner.report.arguments import InputError, check
from vllm_suite.planner.report.pictures import PictureError
from vllm_suite.planner.search.case import Case
from vllm_suite.planner.search.choices import Choices, Settings
from vllm_suite.planner.search.sources import Sources, constants, encoder_maker, measured, source_maker
from vllm_suite.planner.search.state import StateError
from vllm_suite.planner.simulator.order import LengthOrder
from vllm_suite.planner.simulator.setting import Setting
from vllm_suite.planner.sources.base import SourceError
from vllm_suite.planner.traces import TraceError, Workload, item_of, synthetic
from vllm_suite.planner.traces import load as load_trace
from vllm_suite.planner.watch import Recorded, WatchError

IMAGE = "1024x1024"
"""Pixels of a picture where nothing else is said."""


InputError.KINDS = (
    InputError, ModelError, HardwareError, TraceError, PlanError, SourceError, StateError, WatchError, PictureError,
    OSError
)  # fmt: skip


def question(args: argparse.Namespace) -> Case:
    """What is asked. Raises one of `InputError.KINDS`."""
    check(args)
    model, stored = load(args.model)
    hardware = cluster(args.gpus, args.hardware)
    duration("--watch-window", args.watch_window)  # used after the search
    slo = Slo(duration("--ttft", args.ttft), duration("--tpot", args.tpot), args.attainment)
    workload = _workload(args, model)
    rate = args.rate if args.rate is not None else workload.rate
    if args.objective != "goodput" and rate is None:
        raise InputError(f"--objective {args.objective} compares plans at one rate: give --rate, or a trace with times")
    choices = Choices.parse(args.space, stored)
    if not workload.items and all("encode" in kind for kind in choices.kinds):
        raise InputError("--space kinds: plans with encoders need requests with pictures: give --images N")
    if args.watch_file is not None:
        Recorded(args.watch_file).windows()  # so that a bad file is known before the search
    if args.objective in ("cost", "energy", "latency"):
        # Fewer accelerators than there are may be what is best.
        choices = choices if any(word.startswith("idle=") for word in args.space) else replace(choices, idle=True)
    host_us = 1e6 * (duration("--host-time", args.host_time) or 0.0)
    sources = Sources(
        source_maker(args.source, hardware, host_us=host_us), model, stored, hardware,
        encoders=encoder_maker(args.source, hardware, host_us=host_us),
    )  # fmt: skip
    setting = Setting(
        model, stored, hardware, sources, encode_seconds=sources.encode if workload.items else None,
        queue=LengthOrder if args.dler else None,
    )  # fmt: skip
    asked = f"{args.source} with {host_us:g} us of host time a step" if host_us else args.source
    facts, longest = measured(args.source, args.model, model.name), args.max_model_len
    if facts:
        # Times are those of one engine as it was set: so is everything else of it.
        setting = replace(setting, async_scheduling=facts["async_scheduling"], block_size=facts["block_size"],
                          measured=constants(args.source))  # fmt: skip
        choices = replace(choices, kv_blocks=facts["blocks"])
        if not any(word.startswith(("seqs=", "tokens=")) for word in args.space):
            own = (Settings(facts["max_num_seqs"], facts["max_num_batched_tokens"]),)
            choices = replace(choices, any=own, prefill=own, decode=own)
        longest = min(longest or facts["max_model_len"], facts["max_model_len"])
    name = str(Path(args.model).parent) if args.model.endswith(".json") else args.model
    case = Case(
        name, model, stored, hardware, workload, slo, args.objective, rate, sources, setting, choices,
        asked=args.rate is not None, requests=args.requests, seed=args.seed, source=asked,
        longest=longest, dler=args.dler,
    )  # fmt: skip
    _check_lengths(case)
    return case


def duration(name: str, text: str | None) -> float | None:
    """Seconds of an argument; None where it was not given. Raises InputError."""
    if text is None:
        return None
    try:
        found = parse_duration_ms(text) / 1000
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
    if found <= 0:
        raise InputError(f"{name}: {text} is not above 0")
    return found


def _workload(args: argparse.Namespace, model: Model) -> Workload:
    if args.trace is not None:
        found = load_trace(args.trace, args.format or "auto")
        if found.rate is None and args.rate is None and args.objective != "goodput":
            raise InputError(f"{args.trace}: no arrivals were recorded; give --rate")
        return found
    items = ()
    if args.images:
        if model.encoder is None:
            raise InputError(f"--images: {args.model} has no encoder that is known")
        size = args.image_size or IMAGE
        if re.fullmatch(r"[1-9]\d*x[1-9]\d*", size) is None:
            raise InputError(f"--image-size is WIDTHxHEIGHT in pixels, for example {IMAGE}, not {size}")
        items = (item_of(model.encoder, size),) * args.images
    longest = args.max_model_len or model.longest
    return synthetic(args.isl, args.osl, cv=args.cv or 0.0, rate=args.rate, items=items, longest=longest,
                     arrival_cv=1.0 if args.arrival_cv is None else args.arrival_cv)  # fmt: skip


def _check_lengths(case: Case) -> None:
    """Requests longer than the model is an error: no engine would take them."""
    most = case.longest or case.model.longest
    rows = islice(case.workload.rows(case.seed), 100_000 if case.workload.count else 2000)
    longer = [index for index, row in enumerate(rows) if row.prompt + row.output > most]
    if longer:
        raise InputError(
            f"{case.workload.name}: {len(longer)} requests are longer than {most} tokens, the first of them number"
            f" {longer[0]}; {case.name} takes no more"
        )
