"""EPD's fleet (arXiv 2501.05460v4) as the simulator has it: engines described by the constants of a published table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import load
from vllm_suite.planner.plan import Plan, PoolPlan
from vllm_suite.planner.simulator.fleet import simulate_plan
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.simulator.setting import Serving, Setting
from vllm_suite.planner.sources.base import FloatArray, LatencySource, Outside, Uncertainty, as_arrays
from vllm_suite.planner.sources.steps import DecodeLine, Steps
from vllm_suite.planner.workload import Item, Request

ORIGIN = "EPD paper, 8 x A100-80GB"
ENCODERS = 6
"""That a request's images are dealt over: EPD's 6E1P1D."""
ROWS = 640
"""Tokens of a 4032x3024 picture of MiniCPM-V 2.6: ten tiles of 64."""

SEED = 6
"""Of numpy's generator, from which EPD's client draws Poisson arrivals unless told otherwise."""

_ROUNDS = 8

Point = tuple[int, int, float]
"""Images, encoders, seconds to the first token."""


@dataclass(frozen=True)
class Constants:
    """T(n) = ceil(n / k) encode + n prefill + rest, seconds."""

    encode: float
    prefill: float
    rest: float

    def seconds(self, images: int, encoders: int) -> float:
        """Time to the first token of a request alone."""
        return ceil(images / encoders) * self.encode + images * self.prefill + self.rest


def fit(points: Sequence[Point]) -> Constants:
    """Least squares of relative errors."""
    rows = np.array([[ceil(images / encoders), images, 1.0] for images, encoders, _ in points])
    times = np.array([seconds for _, _, seconds in points])
    found, *_ = np.linalg.lstsq(rows / times[:, None], np.ones(len(points)), rcond=None)
    return Constants(*(float(each) for each in found))


class Fixed(LatencySource):
    """Seconds for each token of a prompt, and for a step that decodes, whatever its size."""

    def __init__(self, token: float, decode: float) -> None:
        self.token, self.decode = token, decode
        self.name, self.outside = "constants", Outside("refuse")
        self.uncertainty = Uncertainty(0.0, "constants of a published table")

    def step_seconds(self, steps: Steps) -> float:
        """See `LatencySource`."""
        return float(self.token * steps.prefill_tokens + (self.decode if steps.decode_sequences else 0.0))

    def seconds(self, steps: Steps) -> FloatArray:
        """See `LatencySource`."""
        arrays = as_arrays(steps)
        return np.asarray(self.token * arrays.prefill_tokens + self.decode * (arrays.decode_sequences > 0))

    def decode_line(self, sequences: int, context: float, longest: float = 0, shortest: float = 0) -> DecodeLine:
        """See `LatencySource`."""
        return DecodeLine(self.decode, 0.0)


def setting(constants: Constants, decode: float) -> Setting:
    """EPD's engines: prefill's token is the client's first, the rest of T(n) is a hop on the way, items are dealt to
    the encoder with least to do, nothing is scheduled ahead or found in a cache.
    """
    # The language model of MiniCPM-V 2.6 is Qwen2-7B; its shapes give the sizes of what is handed over.
    model, quant = load("Qwen/Qwen2.5-7B-Instruct")
    source = Fixed(constants.prefill / ROWS, decode)
    return Setting(
        model,
        quant,
        cluster("8xA100-80G"),
        lambda pool: source,
        encode_seconds=lambda pool, item: constants.encode,
        prefix_caching=False,
        async_scheduling=False,
        serving=Serving(
            min_prompt_tokens=0,
            hop_s=constants.rest,
            streams="prefill",
            encode_policy="least_encode_tokens",
            overlap="never",
        ),
    )


def epd(encode: int, prefill: int, decode: int, *, batch: int = 256) -> Plan:
    """So many engines; encoders and prefill take one request at a time, decode a batch."""
    return Plan(
        (
            PoolPlan("encode", encode),
            PoolPlan("prefill", prefill, max_num_seqs=1, max_num_batched_tokens=65536, kv_blocks=20_000),
            PoolPlan("decode", decode, max_num_seqs=batch, kv_blocks=20_000),
        )
    )


def pictures(number: int, arrival: float, images: int, output: int) -> Request:
    """A request of so many pictures and next to no text."""
    items = tuple(Item("4032x3024", ROWS, content=None) for _ in range(images))
    return Request(number, arrival, images * ROWS + 1, output, items=items)


def alone(constants: Constants, images: int, encoders: int) -> float:
    """Time to the first token of a request alone, simulated."""
    found: list[Served] = []
    simulate_plan(epd(encoders, 1, 1), setting(constants, 0.025), [pictures(0, 0.0, images, 2)], found.append)
    return found[0].ttft


def poisson(rate: float, requests: int) -> list[float]:
    """Arrivals as EPD's client draws them: the first at 0."""
    gaps = np.random.RandomState(SEED).gamma(1.0, 1.0 / rate, size=requests)
    return [0.0, *(float(each) for each in np.cumsum(gaps)[:-1])]


def in_turn(constants: Constants, images: int, encoders: int, rate: float, requests: int) -> float:
    """Mean time to the first token of requests that arrive at this rate, simulated."""
    found: list[Served] = []
    asked = (pictures(number, at, images, 2) for number, at in enumerate(poisson(rate, requests)))
    simulate_plan(epd(encoders, 1, 1), setting(constants, 0.025), asked, found.append)
    return sum(each.ttft for each in found) / len(found)


def fit_in_turn(measured: Sequence[Point], rate: float, requests: int) -> Constants:
    """As `fit`, of times that EPD's requests measured while others were there.

    What the simulation says that they wait is taken off, with the constants of the round before. Requests on one
    encoder stand for one of DistServe's seven engines, most of which are idle at such a rate, and wait for nobody.
    """
    constants = fit(measured)
    for _ in range(_ROUNDS):
        constants = fit(
            [
                (images, encoders, seconds - _wait(constants, images, encoders, rate, requests))
                for images, encoders, seconds in measured
            ]
        )
    return constants


def _wait(constants: Constants, images: int, encoders: int, rate: float, requests: int) -> float:
    if encoders == 1:
        return 0.0
    return in_turn(constants, images, encoders, rate, requests) - alone(constants, images, encoders)


def points(sizes: Sequence[int], rows: Iterable[tuple[int, Sequence[float]]], only: Sequence[int]) -> list[Point]:
    """Cells of a table.

    Args:
        sizes: images of its columns.
        rows: encoders and seconds of each row.
        only: columns that are wanted.
    """
    return [
        (size, encoders, seconds)
        for encoders, row in rows
        for size, seconds in zip(sizes, row, strict=True)
        if size in only
    ]


def said(constants: Constants) -> str:
    """For a note."""
    return f"e {constants.encode:.3f}, p {constants.prefill:.4f}, c {constants.rest:.3f} s"
