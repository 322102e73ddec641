"""A calibration of a real engine on a small grid, and steps that it did not see."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest

from vllm_suite.planner.calibrate.design import Cell, order
from vllm_suite.planner.calibrate.engines import engines, gathered
from vllm_suite.planner.calibrate.file import Calibration
from vllm_suite.planner.calibrate.fit import knots_of
from vllm_suite.planner.calibrate.measure import Options, environment, fitted, job
from vllm_suite.planner.sources.calibrated import CalibratedSource

ENGINE = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 128 << 20,
}
SEEN = [
    *(Cell((context,) * count) for count in (1, 2, 4, 8) for context in (16, 256, 640)),
    *(Cell(chunks=((length, before),)) for length in (16, 64, 128, 256) for before in (0, 512)),
    *(Cell((256,) * count, ((length, 0),)) for count in (2, 6) for length in (32, 128, 200)),
    Cell(chunks=((64, 0), (64, 0))),
]
UNSEEN = [
    Cell((400,) * 3),
    Cell((100, 600, 300, 200, 500)),
    Cell(chunks=((180, 128),)),
    Cell((300,) * 4, ((80, 256),)),
    Cell((128,) * 7, ((160, 0),)),
]


@pytest.mark.timeout(240)
def test_steps_that_were_not_measured_are_predicted(model: Path, tmp_path: Path) -> None:
    options = Options(model=str(model), device="cpu", engine=ENGINE)
    cells = [*SEEN, *UNSEEN]
    with engines([job(options, 0)], tmp_path, environment(options)) as [engine]:
        assert engine.facts["max_num_batched_tokens"] == 256
        engine.start(cells, order(len(cells), 1, 1), 60, "warm-up")
        engine.rows(120)
        engine.start(cells, order(len(cells), 5, 2), 90, "alone")
        rows = engine.rows(120)
    measured, odd = gathered(cells, rows)
    # Every batch was made as it was asked for, by vLLM's own account.
    assert odd == 0
    assert len(measured) == len(cells)
    assert {tuple(row["held"]) for row in rows if row["cell"] == len(SEEN) + 3} == {(80, 1, 4)}
    seen, unseen = measured[: len(SEEN)], measured[len(SEEN) :]
    # A longer prompt takes longer, or what was timed is not the step.
    by_name = {each.name: each.seconds for each in measured}
    assert by_name["256@0"] > 2 * by_name["16@0"]
    assert by_name["64@512"] > by_name["64@0"]
    found = fitted(seen, knots_of(seen), options)
    source = CalibratedSource(
        Calibration(model="tiny", device="cpu", machine="", engine=ENGINE, facts=engine.facts, alone=found, grid=[])
    )
    predicted = np.array([source.step_seconds(each.steps) for each in unseen])
    errors = predicted / np.array([each.seconds for each in unseen]) - 1
    # The machine may be busy with something else, so the bound is loose; a wrong form is off by a factor.
    assert statistics.median(abs(errors)) < 0.25, dict(zip([each.name for each in unseen], errors, strict=True))
    assert abs(errors).max() < 0.6
