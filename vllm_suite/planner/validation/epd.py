"""E1, E2, E3 and E5: the tables of EPD (arXiv 2501.05460v4), by formula and out of the simulator.

The paper's figures were transcribed by a third party, so each is right up to a slip of the pen. Its engines are those
of 2024 (vLLM 0.6.1, eager, FP16) on 8 x A100-80GB; they are described by constants, taken from the paper's own tables
as each check's note says, and by no source of step times.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_suite.planner.validation.check import Check, not_run, relative
from vllm_suite.planner.validation.epd_fleet import (
    ENCODERS,
    ORIGIN,
    alone,
    fit,
    fit_in_turn,
    in_turn,
    points,
    said,
)
from vllm_suite.planner.validation.epd_switching import rule, switching


def checks(data: Path) -> Iterator[Check]:
    """All of this module.

    Args:
        data: the folder with ``measured/epd/paper_tables.json``.
    """
    path = data / "measured" / "epd" / "paper_tables.json"
    if path.is_file():
        tables = json.loads(path.read_text(encoding="utf-8"))
        yield from irp(tables["table4_irp_ttft_s"])
        yield from frames(tables["table1_videomme_ttft_s"])
        yield from switching(tables)
    else:
        for id in ("E1", "E2", "E3"):
            yield not_run(id, "EPD's tables", f"{path} is not there", ORIGIN)
    yield rule()


def irp(table: dict[str, Any]) -> Iterator[Check]:
    """E1: 4 and 6 images, from constants of 2 and 8."""
    sizes, rows = table["images"], ((ENCODERS, table["EPD"]), (1, table["noIRP"]))
    constants = fit(points(sizes, rows, (sizes[0], sizes[-1])))
    note = f"k = {ENCODERS}; {said(constants)} fitted to 2 and 8 images of both rows, none of which is counted"
    for images, encoders, seconds in points(sizes, rows, sizes[1:-1]):
        what = f"TTFT of {images} images, {'side by side' if encoders > 1 else 'on one encoder'}, s"
        formula = constants.seconds(images, encoders)
        yield relative("E1", what, formula, seconds, ORIGIN, 0.05, note=f"formula, {note}")
        ours = alone(constants, images, encoders)
        yield relative("E1", what, ours, seconds, ORIGIN, 0.05, others={"formula": formula}, note=f"simulated, {note}")


def frames(table: dict[str, Any]) -> Iterator[Check]:
    """E2: frames of Video-MME, EPD and DistServe, which encodes on prefill."""
    sizes, rows = table["frames"], ((ENCODERS, table["EPD"]), (1, table["DistServe"]))
    rate, requests = float(table.get("rate", 1.0)), int(table.get("n", 100))
    every, ends = points(sizes, rows, sizes), points(sizes, rows, (sizes[0], sizes[-1]))
    whole, outer, quiet = fit(every), fit_in_turn(ends, rate, requests), fit(ends)
    for images, encoders, seconds in every:
        what = f"TTFT of {images} frames, {'EPD' if encoders > 1 else 'DistServe'}, s"
        others: dict[str, Any] = {"simulated": alone(whole, images, encoders)}
        if (images, encoders, seconds) not in ends:
            others["formula from 8 and 64 frames"] = quiet.seconds(images, encoders)
        note = f"k = {ENCODERS}; {said(whole)} fitted to all eight cells, so this is no prediction"
        yield relative("E2", what, whole.seconds(images, encoders), seconds, ORIGIN, 0.1, others=others, note=note)
    for images, encoders, seconds in every:
        if (images, encoders, seconds) in ends:
            continue
        what = f"TTFT of {images} frames, {'EPD' if encoders > 1 else 'DistServe'}, from 8 and 64, s"
        ours = in_turn(outer, images, encoders, rate, requests) if encoders > 1 else alone(outer, images, encoders)
        note = (
            f"k = {ENCODERS}; {said(outer)} fitted to 8 and 64 frames of both rows; {requests} requests at {rate:g}/s"
            " as EPD's client draws them by default, DistServe's seven engines without waiting; EPD's row bends upwards"
            " by more than a time for each image and the waiting"
        )
        others = {"taken as alone": alone(quiet, images, encoders)}
        yield relative("E2", what, ours, seconds, ORIGIN, 0.1, others=others, note=f"simulated, {note}")
