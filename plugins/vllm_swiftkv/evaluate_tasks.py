"""Which tasks an evaluation runs, with which settings, and which of them may skip layers.

The tasks themselves are those of lm-evaluation-harness. Log-likelihoods are read from the logits of prompt tokens,
which a skipped layer leaves out, so a task runs with the skip only where all it asks for is generated text.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vllm_swiftkv.families import SwiftKVError


class Request(BaseModel):
    """One task or group as it is to be run.

    Attributes:
        headline: the metric that the table's average takes, in the harness's form ``name,filter``; None: the first.
        averaged: whether the average takes it at all.
        paper_name: what the paper's protocol calls it, where that differs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    num_fewshot: int | None = None
    chat: bool = False
    multiturn: bool = False
    max_gen_toks: int | None = None
    headline: str | None = None
    averaged: bool = True
    paper_name: str | None = None


def _chat(name: str, shots: int, paper_name: str, multiturn: bool = False) -> Request:
    return Request(
        name=name,
        num_fewshot=shots,
        chat=True,
        multiturn=multiturn,
        max_gen_toks=1024,
        headline="exact_match,strict_match",
        paper_name=paper_name,
    )


# Protocol of the paper (ArcticTraining, branch aqiao/swiftkv-icml25, projects/swiftkv/run_eval.sh). It ran a fork of
# the harness; the four chat tasks came upstream under other names (lm-evaluation-harness PR 2829, by their author).
PAPER: tuple[Request, ...] = (
    _chat("arc_challenge_llama", 0, "arc_challenge_llama_3.1_instruct"),
    Request(name="winogrande", num_fewshot=5, headline="acc,none"),
    Request(name="hellaswag", num_fewshot=10, headline="acc_norm,none"),
    Request(name="truthfulqa_mc2", num_fewshot=0, headline="acc,none"),
    _chat("mmlu_llama", 5, "mmlu_llama_3.1_instruct", multiturn=True),
    _chat("mmlu_cot_llama", 0, "mmlu_cot_0shot_llama_3.1_instruct"),
    _chat("gsm8k_llama", 8, "gsm8k_cot_llama_3.1_instruct", multiturn=True),
    # Not in the paper, and where SwiftKV models lose most; it keeps its own 1280 tokens and stays out of the average.
    Request(name="ifeval", num_fewshot=0, chat=True, headline="prompt_level_strict_acc,none", averaged=False),
)
PRESETS: dict[str, tuple[Request, ...]] = {"paper": PAPER}
PRESET_ENGINE: dict[str, dict[str, Any]] = {"paper": {"max_model_len": 4096}}
RENAMED = {request.paper_name: request.name for request in PAPER if request.paper_name}
_OF_THE_EXTRA = ("langdetect", "immutabledict", "nltk")


class Tasks:
    """The harness's index of tasks.

    Args:
        include_path: folder of task files of one's own.
        names: what will be asked of it; the thousands of files that come with the harness are read only where
            ``include_path`` does not hold all of it.
    """

    def __init__(self, include_path: str | None, names: Sequence[str]) -> None:
        from lm_eval.tasks import TaskManager

        own = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
        if own is not None and not own.all_tasks:
            raise SwiftKVError(f"--include-path {include_path}: there is no task file (*.yaml) with a task in it")
        whole = own is not None and all(leaf is not None for name in names for leaf in _leaves(own.task_index, name))
        self.manager: Any = own if whole else TaskManager(include_path=include_path)

    def check(self, names: Iterable[str]) -> None:
        """Raise SwiftKVError for the first name that is no task, with its new name or those like it."""
        known = self.manager.all_tasks
        for name in names:
            if name in known:
                continue
            if name in RENAMED:
                raise SwiftKVError(f"unknown task {name!r}: in lm_eval it is called {RENAMED[name]!r}")
            near = difflib.get_close_matches(name, known, n=5)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them all"
            raise SwiftKVError(f"unknown task {name!r}: {hint}")

    def generates(self, name: str) -> bool:
        """Whether a task, or every task of a group, asks for generated text and nothing else."""
        leaves = list(_leaves(self.manager.task_index, name))
        return bool(leaves) and all(leaf is not None and _kind(leaf) == "generate_until" for leaf in leaves)

    def load_one_of_each_dataset(self, name: str) -> None:
        """Raise SwiftKVError where a dataset of the task, or a module that it needs, is not to be had.

        The subjects of a group mostly share one dataset; one task of each is tried, since every load asks the hub.
        """
        seen: set[str] = set()
        for leaf in _leaves(self.manager.task_index, name):
            if leaf is None or leaf["task"] not in self.manager.all_tasks:
                continue
            dataset = leaf.get("dataset_path")
            if dataset is None or dataset not in seen:
                seen.add(str(dataset))
                load(self.manager, leaf["task"], dataset)


def load(manager: Any, name: str, dataset: str | None = None) -> None:
    """Make a task or group ready. Raises SwiftKVError, in one line, where that is not possible."""
    try:
        manager.load([name])
    except ImportError as error:
        package = "'vllm-suite[eval]'" if error.name in _OF_THE_EXTRA else error.name
        raise SwiftKVError(f"task {name!r}: {error}; pip install {package}") from error
    except (OSError, ValueError, TypeError, RuntimeError, LookupError) as error:
        # A wrong task file, or what `datasets` raises for a missing file, a refused or an absent network.
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if dataset is None or "/" not in dataset or Path(dataset).exists():
            raise SwiftKVError(f"task {name!r} cannot be loaded: {first}") from error
        raise SwiftKVError(
            f"the dataset {dataset!r} of task {name!r} cannot be loaded: {first}; it comes from the Hugging Face hub: "
            "run once where there is a network, then take HF_HOME along and set HF_HUB_OFFLINE=1"
        ) from error
    if "ifeval" in name:
        _sentence_splitter(name)


def _sentence_splitter(task: str) -> None:
    """ifeval counts sentences when it scores; without this file a whole run would end there."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise SwiftKVError(
            f"task {task!r} needs NLTK's punkt_tab: python -m nltk.downloader punkt_tab, where there is a network"
        ) from error


def _kind(leaf: dict[str, Any]) -> str | None:
    # A task with a class of its own may send any kind of request, whatever its file says.
    return None if "class" in leaf else leaf.get("output_type")


def _leaves(index: dict[str, Any], name: str, above: frozenset[str] = frozenset()) -> Iterator[dict[str, Any] | None]:
    """Configuration of every task below ``name``; None for one that the index does not hold whole."""
    entry = index.get(name)
    if entry is None or name in above:
        yield None
        return
    if entry.cfg is None:  # a tag
        for task in sorted(entry.tags):
            yield from _leaves(index, task, above | {name})
    elif "group" in entry.cfg:
        yield from _members(index, entry.cfg, above | {name})
    else:
        yield entry.cfg


def _members(index: dict[str, Any], group: dict[str, Any], above: frozenset[str]) -> Iterator[dict[str, Any] | None]:
    members = group.get("task") or []
    for member in [members] if isinstance(members, (str, dict)) else members:
        if isinstance(member, str):
            yield from _leaves(index, member, above)
        elif "group" in member and member["group"] not in index:  # a group written inside this one
            yield from _members(index, member, above)
        else:  # a task or a group with some settings replaced
            for leaf in _leaves(index, member.get("group") or member["task"], above):
                yield None if leaf is None else {**leaf, **{k: v for k, v in member.items() if k != "group"}}
