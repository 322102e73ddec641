"""What a distillation learns from: documents, tokens, rows, and errors that name file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import numpy as np
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_suite.fleet.tiny_tokenizer import write_tokenizer
from vllm_swiftkv.distill import rows
from vllm_swiftkv.distill.store import Store, open_store, prepare
from vllm_swiftkv.families import SwiftKVError

CHAT = [
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "It is four."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Six."},
]
MARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, model_max_length=10**9)
    return transformers.AutoTokenizer.from_pretrained(folder)


def jsonl(path: Path, *documents: Any) -> Path:
    path.write_text("".join(json.dumps(d) + "\n" for d in documents))
    return path


def prepared(tmp_path: Path, tokenizer: Any, *documents: Any, max_length: int = 1000) -> Store:
    file = jsonl(tmp_path / "data.jsonl", *documents)
    return open_store(prepare([file], tokenizer, max_length, tmp_path))


def learned(store: Store, document: int, tokenizer: Any) -> str:
    here = slice(store.offsets[document], store.offsets[document + 1])
    return str(tokenizer.decode(store.tokens[here][store.learn[here].astype(bool)].astype(int).tolist()))


def test_of_a_conversation_the_assistants_words_are_learned(tmp_path: Path, tokenizer: Any) -> None:
    store = prepared(tmp_path, tokenizer, {"messages": CHAT, "source": "kept out"})
    assert learned(store, 0, tokenizer) == "It is four.<|end|>Six.<|end|>"
    ids = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert store.tokens.tolist() == ids


def test_of_a_template_with_marks_what_they_mark(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", MARKED)
    store = prepared(tmp_path, tokenizer, {"messages": CHAT})
    assert learned(store, 0, tokenizer) == "It is four.<|end|>Six.<|end|>"


def test_of_prompt_and_completion_the_completion_and_of_a_text_everything(tmp_path: Path, tokenizer: Any) -> None:
    store = prepared(tmp_path, tokenizer, {"prompt": "Two and two is", "completion": " four."}, {"text": "All of it."})
    assert learned(store, 0, tokenizer) == " four.</s>"
    assert learned(store, 1, tokenizer) == "All of it.</s>"


def test_a_long_text_is_split_and_a_long_reply_cut_off(tmp_path: Path, tokenizer: Any) -> None:
    text = "some words " * 20
    whole = len(tokenizer(text).input_ids) + 1
    store = prepared(tmp_path, tokenizer, {"text": text}, {"prompt": "p", "completion": text}, max_length=32)
    assert store.lengths().tolist() == [32] * (whole // 32) + [whole % 32] + [32]
    assert store.cut_off == 1
    store = prepared(tmp_path, tokenizer, {"prompt": text, "completion": "c"}, {"text": "kept"}, max_length=32)
    assert (len(store), store.dropped) == (1, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        ("[1]", "an object is expected"),
        ('{"content": "x"}', "found: content"),
        ('{"text": ""}', "text must be a string"),
        ('{"prompt": "x"}', "completion must be"),
        ('{"messages": []}', "list that is not empty"),
        ('{"messages": [{"role": "assistant"}]}', "content must be a string"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "nothing to learn"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(SwiftKVError, match=rf"data\.jsonl:3: .*{message}"):
        prepare([file], tokenizer, 100, tmp_path)
    assert not list(tmp_path.glob("data-*"))


def test_a_template_that_forgets_is_an_error_not_a_wrong_mask(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", FORGETFUL)
    with pytest.raises(SwiftKVError, match=r"data\.jsonl:1: .*generation"):
        prepared(tmp_path, tokenizer, {"messages": CHAT})
    assert learned(prepared(tmp_path, tokenizer, {"messages": CHAT[:2]}), 0, tokenizer) == "It is four.<|end|>"


def test_other_bad_data_is_an_error(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    with pytest.raises(SwiftKVError, match="does not exist"):
        prepare([tmp_path / "absent.jsonl"], tokenizer, 100, tmp_path)
    with pytest.raises(SwiftKVError, match="anything to learn"):
        prepare([jsonl(tmp_path / "empty.jsonl")], tokenizer, 100, tmp_path)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(SwiftKVError, match="no chat template"):
        prepared(tmp_path, tokenizer, {"messages": CHAT})


def test_prepared_data_is_used_again_until_a_file_changes(tmp_path: Path, tokenizer: Any) -> None:
    file = jsonl(tmp_path / "data.jsonl", {"text": "one"})
    first = prepare([file], tokenizer, 100, tmp_path)
    stamp = (first / "tokens.bin").stat().st_mtime_ns
    assert prepare([file], tokenizer, 100, tmp_path) == first
    assert (first / "tokens.bin").stat().st_mtime_ns == stamp
    jsonl(file, {"text": "one"}, {"text": "two"})
    second = prepare([file], tokenizer, 100, tmp_path)
    assert second != first
    assert open_store(first).digest != open_store(second).digest


def test_a_saved_dataset_is_the_same_as_its_lines(tmp_path: Path, tokenizer: Any) -> None:
    pytest.importorskip("datasets", reason="the extra `train` is not installed")
    import pyarrow

    documents = [{"text": "one text"}, {"text": "another"}]
    # What save_to_disk writes, without it: some versions of datasets and pyarrow cannot make a dataset at all.
    folder = tmp_path / "saved"
    folder.mkdir()
    table = pyarrow.Table.from_pylist(documents)
    with pyarrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    features = {"text": {"dtype": "string", "_type": "Value"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0", "_split": None}
    state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
    (folder / "state.json").write_text(json.dumps(state))
    store = open_store(prepare([folder], tokenizer, 100, tmp_path))
    assert store.digest == prepared(tmp_path, tokenizer, *documents, max_length=100).digest


def test_a_folder_that_is_no_dataset_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(SwiftKVError, match=r"no dataset that save_to_disk wrote|vllm-suite\[train\]"):
        prepare([tmp_path / "folder"], tokenizer, 100, tmp_path)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=50), st.booleans())
def test_rows_hold_every_document_once_and_fit(lengths: list[int], packing: bool) -> None:
    documents = np.random.default_rng(0).permutation(len(lengths))
    made = rows.pack(np.array(lengths), documents, 40, packing)
    assert np.concatenate(made).tolist() == documents.tolist()
    assert all(sum(lengths[d] for d in row) <= 40 for row in made)
    assert packing or len(made) == len(lengths)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 5))
def test_every_epoch_takes_every_row_once_in_an_order_of_its_own(count: int, per_step: int, seed: int) -> None:
    made = [np.array([i]) for i in range(count)]
    schedule = rows.Schedule(made, per_step, seed)
    taken = [int(row[0]) for step in range(3 * count) for row in schedule.at(step)]
    for epoch in range(3 * per_step):
        assert sorted(taken[epoch * count : (epoch + 1) * count]) == list(range(count))
    # Asked out of order, as after a resume, it gives the same.
    again = rows.Schedule(made, per_step, seed)
    assert [int(row[0]) for row in again.at(2 * count)] == taken[2 * count * per_step :][:per_step]


def test_a_batch_says_where_documents_begin_and_what_follows(tmp_path: Path, tokenizer: Any) -> None:
    store = prepared(tmp_path, tokenizer, {"prompt": "ab", "completion": "c"}, {"text": "de"}, {"text": "fghijk"})
    a, b, c = (store.tokens[store.offsets[i] : store.offsets[i + 1]].astype(int).tolist() for i in range(3))
    batch = rows.collate(store, [np.array([0, 1]), np.array([2])])
    width = max(len(a) + len(b), len(c))
    assert batch.ids[0].tolist() == a + b + [0] * (width - len(a) - len(b))
    assert batch.positions[0, : len(a) + len(b)].tolist() == [*range(len(a)), *range(len(b))]
    assert batch.positions[1, len(c) :].tolist() == [*range(width - len(c))]
    assert batch.labels[0, : len(a) + len(b)].tolist() == [*a[1:], 0, *b[1:], 0]
    # Positions before a token to learn: the completion's, and none across the seam of two documents.
    mask = store.learn[store.offsets[0] : store.offsets[1]]
    assert batch.learn[0, : len(a)].tolist() == [bool(x) for x in mask[1:]] + [False]
    assert not batch.learn[0, len(a) - 1]
    assert batch.real.sum().item() == len(a) + len(b) + len(c)


def test_held_out_documents_are_not_trained_on() -> None:
    train, held = rows.split_held_out(100, 0.1, seed=3)
    assert sorted([*train, *held]) == list(range(100))
    assert len(held) == 10
    assert [len(part) for part in rows.split_held_out(2, 0.001, 0)] == [1, 1]
