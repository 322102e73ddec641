"""The logits processors that end a request at its recorded length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm.v1.sample.logits_processor")


@pytest.mark.slow
def test_requests_end_at_their_lengths_and_others_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import planner_eos
    import replay_eos
    from vllm.v1.sample.logits_processor import BatchUpdate

    file = tmp_path / "lengths.json"
    file.write_text(json.dumps([[5, 6, 2], [7, 8, 3]]))
    monkeypatch.setenv(planner_eos.ENV_LENGTHS, str(file))
    outputs: list[list[int]] = [[], [], []]
    prompts = ([5, 6, 9], [7, 8], [1, 1])
    update = BatchUpdate(3, (), [(row, None, prompts[row], outputs[row]) for row in range(3)], ())  # type: ignore[arg-type]
    ends = planner_eos.EndAtLength(None, torch.device("cpu"), False)
    ends.update_state(update)
    ended = []
    for _ in range(3):
        logits = ends.apply(torch.zeros(3, 10))
        ended.append([row for row in range(3) if int(logits[row].argmax()) == planner_eos.EOS])
        for output in outputs:
            output.append(4)
    assert ended == [[], [0], [0, 1]]
    strict = replay_eos.EndAtLength(None, torch.device("cpu"), False)
    with pytest.raises(KeyError):
        strict.update_state(update)
