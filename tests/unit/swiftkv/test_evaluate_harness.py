"""The preset and the names of tasks against the installed lm-evaluation-harness; no engine, no network.

The harness lives in an environment of its own, so one process there answers for all tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from evaluation import PYTHON, REASON

from vllm_swiftkv.evaluate_tasks import PAPER, RENAMED

pytestmark = pytest.mark.skipif(PYTHON is None, reason=REASON)

EXAMPLE = Path(__file__).resolve().parents[3] / "docs" / "examples" / "swiftkv-eval"

ASK = """
import json, sys
from vllm_swiftkv.evaluate_tasks import PAPER, RENAMED, Request, Tasks, _leaves, _sentence_splitter, load
from vllm_swiftkv.families import SwiftKVError

names = [r.name for r in PAPER]
tasks = Tasks(sys.argv[1], [*names, "suite_sums"])
tasks.check(names)
index = tasks.manager.task_index
found = {"generates": {n: tasks.generates(n) for n in [*names, "mmlu", "squadv2", "ai2_arc", "leaderboard"]}}
found["shots"] = {r.name: sorted({str(leaf.get("num_fewshot")) for leaf in _leaves(index, r.name)}) for r in PAPER}
found["metrics"] = {
    n: sorted({(m["metric"], f["name"]) for leaf in _leaves(index, n) for m in leaf["metric_list"]
               for f in leaf.get("filter_list") or [{"name": "none"}]}) for n in names
}
found["old names"] = [n for n in RENAMED if n in tasks.manager.all_tasks]

def error(function, *args):
    try:
        function(*args)
    except SwiftKVError as error:
        return str(error)

found["errors"] = [error(tasks.check, [n]) for n in ("gsm8k_llam", "mmlu_llama_3.1_instruct", "qqqqqqqq")]
found["offline"] = error(tasks.load_one_of_each_dataset, "mmlu_llama")
sys.modules["langdetect"] = None
found["module"] = error(load, tasks.manager, "ifeval")
found["splitter"] = error(_sentence_splitter, "ifeval")
own = Tasks(sys.argv[1], ["suite_capitals", "suite_sums"])
found["own"] = [len(own.manager.all_tasks), own.generates("suite_capitals"), own.generates("suite_sums")]
found["mixed"] = tasks.generates("suite_sums")

from lm_eval.evaluator import simple_evaluate
from vllm_swiftkv.evaluate_report import rows

own = Tasks(sys.argv[3], ["suite_broken", "suite_both", "suite_tag"])
found["broken"] = error(own.load_one_of_each_dataset, "suite_broken")
found["rows"] = {}
for name in ("suite_both", "suite_tag", "suite_second"):
    results = simple_evaluate(model="dummy", tasks=[name], task_manager=own.manager, limit=3)
    found["rows"][name] = [
        (r.task, r.metric, r.headline, r.stderr is not None, r.samples, r.version)
        for r in rows(Request(name=name), results, True)
    ]
found["empty"] = error(Tasks, sys.argv[2], ["suite_sums"])
print(json.dumps(found))
"""


# Beside the tasks of the example: a group, a tag, and a task whose data cannot be had.
OWN = {
    "second.yaml": "include: sums.yaml\ntask: suite_second\ntag: suite_tag\n",
    "both.yaml": """
group: suite_both
task: [suite_sums, suite_second]
aggregate_metric_list:
  - {metric: exact_match, aggregation: mean, weight_by_size: true, filter_list: [number]}
metadata: {version: 3}
""",
    "broken.yaml": "include: sums.yaml\ntask: suite_broken\ncustom_dataset: !function broken.load\n",
    "broken.py": "def load(**_):\n    raise OSError('no rows today')\n",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    empty = tmp_path_factory.mktemp("empty")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(empty / "home")}
    folder = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("own") / "tasks")
    for name, text in OWN.items():
        (folder / name).write_text(text)
    words = [str(PYTHON), "-c", ASK, str(EXAMPLE), str(empty), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_every_task_of_the_preset_exists_and_skips_only_where_it_generates(found: dict[str, Any]) -> None:
    assert found["generates"] == {
        "truthfulqa_mc2": False,
        "winogrande": False,
        "hellaswag": False,
        "arc_challenge_llama": True,
        "gsm8k_llama": True,
        "mmlu_llama": True,
        "mmlu_cot_llama": True,
        "ifeval": True,
        "mmlu": False,
        "squadv2": False,
        "ai2_arc": False,
        "leaderboard": False,
    }


def test_the_preset_averages_metrics_that_its_tasks_have(found: dict[str, Any]) -> None:
    for request in PAPER:
        assert request.headline is not None
        assert request.headline.split(",") in found["metrics"][request.name]


def test_the_preset_overrides_no_number_of_examples_that_the_harness_would_keep(found: dict[str, Any]) -> None:
    """The harness ignores a number of examples where a task says 0, so ours must then be 0 too."""
    for request in PAPER:
        if "0" in found["shots"][request.name]:
            assert request.num_fewshot == 0


def test_names_of_the_papers_fork_are_still_absent(found: dict[str, Any]) -> None:
    assert found["old names"] == []
    assert set(RENAMED.values()) <= set(found["generates"])


def test_unknown_names(found: dict[str, Any]) -> None:
    near, renamed, far = found["errors"]
    assert near.startswith("unknown task 'gsm8k_llam': did you mean gsm8k_llama")
    assert renamed == "unknown task 'mmlu_llama_3.1_instruct': in lm_eval it is called 'mmlu_llama'"
    assert far == "unknown task 'qqqqqqqq': `lm-eval ls tasks` lists them all"


def test_what_is_missing_is_said_in_one_line(found: dict[str, Any]) -> None:
    assert found["offline"].startswith("the dataset 'hails/mmlu_no_train' of task 'mmlu_llama_")
    assert "HF_HUB_OFFLINE=1" in found["offline"]
    assert "\n" not in found["offline"]
    assert found["module"].startswith("task 'ifeval': ")
    assert found["module"].endswith("; pip install 'vllm-suite[eval]'")
    assert found["splitter"].startswith("task 'ifeval' needs NLTK's punkt_tab: ")
    assert found["broken"] == "task 'suite_broken' cannot be loaded: no rows today"
    assert "there is no task file" in found["empty"]


def test_tasks_of_ones_own_are_read_alone_or_beside_the_harnesss(found: dict[str, Any]) -> None:
    assert found["own"] == [2, False, True]
    assert found["mixed"]


def test_rows_of_the_harnesss_own_results(found: dict[str, Any]) -> None:
    """On its model that answers at random: a group has one row, a tag one for each of its tasks."""
    metric = "exact_match, number"
    assert found["rows"] == {
        "suite_both": [["suite_both", metric, True, True, None, "3"]],
        "suite_tag": [["suite_tag", f"suite_second: {metric}", True, True, 3, 1.0]],
        "suite_second": [["suite_second", metric, True, True, 3, 1.0]],
    }
