"""The calibration's grid, fit, file and source, on steps whose times are known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_suite.planner.calibrate.design import Cell, Range, grid, order
from vllm_suite.planner.calibrate.engines import gathered
from vllm_suite.planner.calibrate.file import Calibration, Serving, load
from vllm_suite.planner.calibrate.fit import Measured, cross_validated, fit, knots_of, nonnegative, relative_errors
from vllm_suite.planner.calibrate.loaded import STREAM, with_load
from vllm_suite.planner.calibrate.measure import Options, fitted
from vllm_suite.planner.calibrate.model import StepModel
from vllm_suite.planner.calibrate.probe import Probe, decode_seconds, prompt_seconds
from vllm_suite.planner.calibrate.serving import _request_cpu, fit_serving
from vllm_suite.planner.sources.base import Outside, SourceError
from vllm_suite.planner.sources.calibrated import CalibratedSource
from vllm_suite.planner.sources.steps import Steps

LIMITS = Range(max_num_seqs=16, max_num_batched_tokens=512, max_model_len=2048, kv_tokens=65_536, block=128)
# A weight-bound start, then arithmetic: flat up to 16 tokens, a millisecond a token from there on.
TRUE = StepModel(
    knots=(1.0, 16.0, 512.0), slopes=(1e-5, 1e-3), constant=0.02, chunk=3e-4, before=2e-6, pair=4e-7, sequence=2e-4,
    key=1e-6,
)  # fmt: skip


def measured(model: StepModel = TRUE, noise: float = 0.0, seed: int = 0) -> list[Measured]:
    draw = np.random.default_rng(seed)
    return [
        Measured(
            cell.name, cell.sums(), model.step_seconds(cell.sums()) * float(np.exp(noise * draw.standard_normal()))
        )
        for cell in grid(LIMITS)
    ]


def calibration(noise: float = 0.0, slower: float | None = None) -> Calibration:
    cells = measured(noise=noise)
    options = Options(model="m", device="cpu")
    beside = None
    if slower is not None:
        scaled = [Measured(each.name, each.steps, each.seconds * slower) for each in cells]
        beside = fitted(scaled, knots_of(cells), options)
    return Calibration(
        model="m", device="cpu", machine="here", engine={"max_num_seqs": 16}, facts={"block_size": 128},
        alone=fitted(cells, knots_of(cells), options), beside=beside, grid=[],
    )  # fmt: skip


# -- grid


def test_the_grid_keeps_to_the_limits_and_reaches_them() -> None:
    cells = grid(LIMITS)
    assert max(cell.tokens for cell in cells) == 512
    assert max(len(cell.contexts) for cell in cells) == 16
    # A chunk takes a place as a decoding sequence does; the engine would leave it waiting.
    assert max(len(cell.contexts) + len(cell.chunks) for cell in cells) == 16
    assert max(len(cell.contexts) for cell in cells if cell.chunks) == 15
    assert all(before % LIMITS.block == 0 for cell in cells for _, before in cell.chunks)
    longest = max(
        [*(context for cell in cells for context in cell.contexts), *(sum(c) for x in cells for c in x.chunks)]
    )
    assert LIMITS.max_model_len - 256 < longest < LIMITS.max_model_len
    assert all(4 * (sum(cell.contexts) + sum(map(sum, cell.chunks))) <= LIMITS.kv_tokens for cell in cells)
    kinds = {(bool(cell.contexts), bool(cell.chunks)) for cell in cells}
    assert kinds == {(True, False), (False, True), (True, True)}
    assert len({cell.name for cell in cells}) == len(cells)


def test_a_window_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="max_model_len 256 with blocks of 128"):
        grid(Range(16, 512, 256, 65_536, 128))


def test_every_cycle_has_every_cell_once_and_its_own_order() -> None:
    found = order(20, 3, seed=1)
    cycles = [found[at : at + 20] for at in (0, 20, 40)]
    assert all(sorted(cycle) == list(range(20)) for cycle in cycles)
    assert cycles[0] != cycles[1] != list(range(20))


def test_medians_leave_out_steps_that_held_something_else() -> None:
    cells = [Cell(contexts=(100, 300))]
    rows: list[dict[str, Any]] = [
        {"cell": 0, "seconds": value, "contexts": contexts, "as_asked": asked}
        for value, contexts, asked in ((1.0, [99, 299], True), (9.0, [1, 1], False), (3.0, [101, 301], True))
    ]
    [found], odd = gathered(cells, rows)
    assert (found.seconds, found.samples, odd) == (2.0, 2, 1)
    assert found.steps == Steps(0, 0, 0, 0, 2, 400.0, 300.0, 100.0)
    with pytest.raises(SourceError, match="none of 1 measured steps"):
        gathered(cells, rows[1:2])


# -- fit


@pytest.mark.parametrize("seed", range(8))
def test_least_squares_meet_the_conditions_of_the_optimum(seed: int) -> None:
    """Columns that resemble each other: some enter and have to leave again."""
    draw = np.random.default_rng(seed)
    matrix = draw.random((40, 4)) @ draw.random((4, 12)) + 0.05 * draw.random((40, 12))
    target = matrix @ np.where(draw.random(12) < 0.5, -1.0, 1.0) + 0.1 * draw.standard_normal(40) + 3
    found = nonnegative(matrix, target)
    gradient = matrix.T @ (matrix @ found - target)
    assert (found >= 0).all()
    assert (found == 0).any()
    assert np.abs(gradient[found > 0]).max(initial=0) < 1e-6
    assert gradient[found == 0].min() > -1e-6


def test_a_known_model_is_found_again() -> None:
    cells = measured()
    model = fit(cells, TRUE.knots)
    assert np.allclose(model.vector, TRUE.vector, rtol=1e-6, atol=1e-12)
    # With the knots of the grid in place of the true ones the times are the same.
    assert np.abs(relative_errors(fit(cells), cells)).max() < 1e-6


def test_a_small_step_may_take_longer_than_a_larger_one() -> None:
    """Two rows by one kernel, four by another one that is quicker; beyond 16 tokens a dip is taken for noise."""
    knots = (1.0, 2.0, 3.0, 4.0, 8.0, 16.0, 64.0, 512.0)
    dip = StepModel(knots, (4e-3, 0.0, -5e-3, 1e-4, 1e-3, 1e-3, 1e-3), *TRUE.vector[:6])
    few = replace(LIMITS, dense=0.5)
    cells = [Measured(cell.name, cell.sums(), dip.step_seconds(cell.sums())) for cell in grid(few)]
    assert {2, 3, 4, 6} < {cell.steps.decode_sequences for cell in cells}
    found = fit(cells)
    for count in (1, 2, 3, 4, 16):
        steps = Steps.of(contexts=[700] * count)
        assert found.step_seconds(steps) == pytest.approx(dip.step_seconds(steps), rel=1e-3)
    later = StepModel(knots, (1e-3, 1e-3, 1e-3, 1e-3, 1e-3, -1e-5, 1e-3), *TRUE.vector[:6])
    cells = [Measured(cell.name, cell.sums(), later.step_seconds(cell.sums())) for cell in grid(few)]
    assert min(slope for slope, low in zip(fit(cells, knots).slopes, knots, strict=False) if low >= 16) >= 0.0


def test_errors_are_relative() -> None:
    """A cell of a tenth of a second and one of a hundredth, off by as many percent, count alike."""
    flat = Steps(0, 0, 0, 0, 1, 0)
    cells = [Measured("a", flat, 0.01)] * 4 + [Measured("b", flat, 0.02)] * 4
    found = fit(cells, (1.0, 2.0)).step_seconds(flat)
    # The minimum of sum((x / t - 1)²) lies nearer to the smaller time than their mean.
    assert found == pytest.approx((4 / 0.01 + 4 / 0.02) / (4 / 0.01**2 + 4 / 0.02**2))


def test_held_out_errors_are_larger_than_the_residuals_and_as_large_as_the_noise() -> None:
    cells = measured(noise=0.05)
    residual = float(np.abs(relative_errors(fit(cells), cells)).mean())
    found = cross_validated(cells)
    assert residual < found.mean
    assert 0.03 < found.mean < 0.09
    assert found.mean < found.p90 < abs(found.worst)
    assert found.cells == len(cells)
    assert found.worst_cell in {cell.name for cell in cells}


def test_a_left_out_cell_is_not_seen() -> None:
    """One cell is ten times as slow as the form allows: only where it is left out its error is that large."""
    cells = measured()
    odd = next(place for place, cell in enumerate(cells) if cell.steps.decode_sequences == 4)
    cells[odd] = Measured("odd", cells[odd].steps, cells[odd].seconds * 10)
    found = cross_validated(cells)
    assert found.worst_cell == "odd"
    assert found.worst == pytest.approx(-0.9, abs=0.03)


def test_too_few_cells_are_refused() -> None:
    with pytest.raises(SourceError, match="5 measured cells; a fit needs at least 8"):
        fit(measured()[:5])


# -- source


def test_one_step_an_array_and_a_line_agree() -> None:
    source = CalibratedSource(calibration(), outside=Outside("refuse"))
    cells = [cell.sums() for cell in grid(LIMITS)]
    columns = Steps(*(np.array(column, dtype=float) for column in zip(*cells, strict=True)))
    each = [source.step_seconds(steps) for steps in cells]
    assert np.allclose(source.seconds(columns), each, rtol=1e-12)
    assert np.allclose(each, [TRUE.step_seconds(steps) for steps in cells], rtol=1e-6)
    assert source.step_seconds(Steps()) == 0.0
    line = source.decode_line(4, 1200)
    for index in (0, 1, 50):
        assert line.seconds + line.slope * index == pytest.approx(
            source.step_seconds(Steps(0, 0, 0, 0, 4, 1200 + 4 * index))
        )


def test_a_line_ends_where_the_grid_does() -> None:
    source = CalibratedSource(calibration())
    high = source.bounds.context_high
    line = source.decode_line(2, 2 * high - 20)
    assert line.steps == 11
    last = Steps(0, 0, 0, 0, 2, 2 * high)
    assert line.seconds + line.slope * 10 == pytest.approx(source.step_seconds(last))
    with pytest.raises(SourceError, match="mean context"):
        source.decode_line(2, 2 * high + 2)


@pytest.mark.parametrize(
    ("steps", "axis"),
    [
        (Steps.of([(600, 0)]), "tokens in a step"),
        (Steps.of([(128, 1900)]), "tokens before a prompt chunk"),
        (Steps.of(contexts=[100] * 17), "decoding sequences"),
        (Steps.of(contexts=[2040]), "mean context"),
        (Steps.of(contexts=[1]), "mean context"),
        (Steps.of([(8, 0)] * 9), "prompt chunks"),
    ],
)
def test_beyond_the_grid_it_refuses_or_counts(steps: Steps, axis: str) -> None:
    found = calibration()
    with pytest.raises(SourceError, match=axis):
        CalibratedSource(found).step_seconds(steps)
    with pytest.raises(SourceError, match=axis):
        CalibratedSource(found).seconds(Steps(*(np.array([float(each)]) for each in steps)))
    clamping = CalibratedSource(found, outside=Outside("clamp"))
    alone = clamping.step_seconds(steps)
    [(name, count)] = clamping.outside.counts.items()
    assert name.startswith(axis)
    assert count == 1
    assert 0 < alone < 2 * TRUE.step_seconds(steps)
    assert clamping.seconds(Steps(*(np.array([float(each)]) for each in steps)))[0] == pytest.approx(alone)


def test_a_clamped_line_is_what_single_steps_are() -> None:
    source = CalibratedSource(calibration(), outside=Outside("clamp"))
    high = source.bounds.context_high
    line = source.decode_line(2, 2 * high + 100)
    assert (line.slope, line.steps) == (0.0, math.inf)
    assert line.seconds == source.step_seconds(Steps(0, 0, 0, 0, 2, 2 * high + 900))


def test_neighbours_lie_between_alone_and_beside() -> None:
    found = calibration(slower=1.5)
    steps = Steps.of([(128, 0)], [500] * 4)
    alone, half, both = (CalibratedSource(found, neighbours=share).step_seconds(steps) for share in (0.0, 0.5, 1.0))
    assert both / alone == pytest.approx(1.5, rel=1e-6)
    assert half == pytest.approx((alone + both) / 2)
    with pytest.raises(SourceError, match="calibrate with --engines"):
        CalibratedSource(calibration(), neighbours=0.5)


def test_its_uncertainty_is_the_held_out_error() -> None:
    found = calibration(noise=0.05)
    source = CalibratedSource(found)
    assert source.uncertainty.relative == found.alone.held_out.two_thirds > 0.02
    assert found.alone.held_out.worst_cell in source.uncertainty.origin


# -- what is served


def test_constants_of_serving_are_found_again() -> None:
    probe = Probe((16, 96, 480, 900), (1, 2, 4, 8), 1, 512, range(16, 400))
    gaps = {size: [decode_seconds(TRUE, probe, size) + 0.002 + 0.0005 * size] * 3 for size in probe.batches}
    first = {}
    for length in probe.prompts:
        seconds, steps = prompt_seconds(TRUE, length, 512)
        assert steps == (1 if length <= 512 else 2)
        first[length] = [seconds + steps * 0.002 + 0.0005 + 0.01 + 3e-5 * length, 9.0, 0.0]
    found = fit_serving(first, gaps, probe, TRUE, TRUE, "here")
    assert found.step_s == pytest.approx(0.002)
    assert found.sequence_s == pytest.approx(0.0005)
    assert found.request_s == pytest.approx(0.01)
    assert found.prompt_token_s == pytest.approx(3e-5)
    assert found.error == pytest.approx(0.0, abs=1e-9)
    served = calibration().model_copy(update={"serving": {"here": found}})
    steps = Steps.of([(64, 0)], [300] * 3)
    plain, more = CalibratedSource(served), CalibratedSource(served, serving="here")
    assert more.step_seconds(steps) - plain.step_seconds(steps) == pytest.approx(0.002 + 4 * 0.0005)
    line = more.decode_line(3, 900)
    assert line.seconds == pytest.approx(more.step_seconds(Steps(0, 0, 0, 0, 3, 900)))
    with pytest.raises(SourceError, match="'there' was not measured; there is here"):
        CalibratedSource(served, serving="there")


def test_what_a_prompt_takes_of_the_cores_is_in_its_step() -> None:
    probe = Probe((16, 96, 480, 900), (1, 2, 4, 8), 1, 512, range(16, 400))
    gaps = {size: [decode_seconds(TRUE, probe, size)] * 3 for size in probe.batches}
    first = {}
    for length in probe.prompts:
        seconds, steps = prompt_seconds(TRUE, length, 512)
        first[length] = [seconds + steps * 0.006 + 0.01]
    found = fit_serving(first, gaps, probe, TRUE, TRUE, "here", prompt_cpu_s=0.006)
    assert found.request_s == pytest.approx(0.01)
    served = calibration().model_copy(update={"serving": {"here": found}})
    steps = Steps.of([(64, 0), (32, 0)], [300] * 3)
    plain = CalibratedSource(served).step_seconds(steps)
    assert CalibratedSource(served, serving="here").step_seconds(steps) - plain == pytest.approx(2 * 0.006)
    assert CalibratedSource(served, serving="here", prompt_s=0.002).step_seconds(steps) - plain == pytest.approx(0.004)
    arrays = Steps(*(np.array([float(each)]) for each in steps))
    assert CalibratedSource(served, serving="here").seconds(arrays)[0] - plain == pytest.approx(2 * 0.006)


@pytest.mark.parametrize("handed_over", [False, True])
def test_what_company_costs_is_what_the_steps_leave(handed_over: bool) -> None:
    """Prompts beside a stream: the rest of a step, their own step with it, and 8 ms that nothing explains."""
    probe = Probe((16, 96, 480, 900), (1, 2), 1, 512, range(16, 400), batch_prompt=24)
    served = Serving(
        step_s=0.001, sequence_s=0.0002, request_s=0.004, prompt_token_s=1e-5, prompt_cpu_s=0.003, answer_cpu_s=0.002,
        requests=10, error=0.0, via="here",
    )  # fmt: skip
    stream = 24 + STREAM // 2
    found = []
    for length in (16, 96, 480):
        gap = decode_seconds(TRUE, probe, 1) + 0.001 + 0.0002
        if handed_over:
            own = TRUE.step_seconds(Steps.of([(length, 0)])) + 0.001 + 0.0002 + 0.003
            own += TRUE.step_seconds(Steps.of([(1, length - 1)], [stream])) + 0.001 + 2 * 0.0002 + 0.002
        else:
            own = TRUE.step_seconds(Steps.of([(length, 0)], [stream])) + 0.001 + 2 * 0.0002 + 0.003
        for rest in (0.1, 0.5, 0.9):
            found.append((length, rest * gap + own + 0.004 + 1e-5 * length + 0.008))
    # One of each end is left out: a hiccup among twelve does not count.
    found += [(16, 9.0), (96, 0.0), (480, found[-2][1])]
    more = with_load(found, probe, served, TRUE, handed_over=handed_over)
    assert more.busy_s == pytest.approx(0.008)
    assert more.requests == 22
    assert with_load([(16, 0.001)], probe, served, TRUE, handed_over=handed_over).busy_s == 0.0


def test_the_cpu_time_of_a_request_is_without_that_of_an_idle_fleet() -> None:
    # Two HTTP servers and what stands beside them; idle they use 1, 0 and 2 % of a core.
    used, idle = (0.9, 0.4, 0.9), (0.04, 0.0, 0.08)
    assert _request_cpu(used, idle, 20.0, 100, handed_over=False) == pytest.approx((0.007 + 0.004, 0.0))
    assert _request_cpu(used, idle, 20.0, 100, handed_over=True) == pytest.approx((0.007 + 0.005, 0.004))


# -- file


@pytest.mark.parametrize("name", ["c.yaml", "c.json"])
def test_a_file_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    found = calibration(noise=0.03, slower=1.2)
    found.save(tmp_path / name)
    assert load(tmp_path / name) == found
    steps = Steps.of([(100, 0)], [700])
    assert CalibratedSource.load(tmp_path / name).step_seconds(steps) == CalibratedSource(found).step_seconds(steps)


def test_a_wrong_file_is_named_with_its_key(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    with pytest.raises(SourceError, match=r"c\.yaml"):
        load(path)
    data = calibration().model_dump(mode="json")
    data["alone"]["step"]["key"] = -1.0
    path.write_text(json.dumps(data))
    with pytest.raises(SourceError, match=r"alone\.step\.key: Input should be greater"):
        load(path)
    data["alone"]["step"] |= {"key": 0.0, "slopes": [0.0]}
    path.write_text(json.dumps(data))
    with pytest.raises(SourceError, match="one slope fewer"):
        CalibratedSource.load(path)
