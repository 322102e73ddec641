"""The tiny checkpoint: made offline, the same every time, readable by the libraries that vLLM uses."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from vllm_suite.fleet.tiny import TinyConfig, make_tiny_model
from vllm_suite.fleet.tiny_tokenizer import BOS_ID, FIRST_TEXT_ID, SPECIAL, VOCAB_SIZE


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_equal_settings_give_equal_files(tmp_path: Path) -> None:
    began = time.monotonic()
    one = files(make_tiny_model(tmp_path / "one", TinyConfig(seed=3)))
    assert time.monotonic() - began < 5
    assert one == files(make_tiny_model(tmp_path / "two", TinyConfig(seed=3)))
    other = files(make_tiny_model(tmp_path / "three", TinyConfig(seed=4)))
    assert one["model.safetensors"] != other["model.safetensors"]


def test_a_finished_checkpoint_is_kept_and_another_one_replaced(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path) / "model.safetensors"
    written = path.stat().st_mtime_ns
    make_tiny_model(tmp_path)
    assert path.stat().st_mtime_ns == written
    (tmp_path / "tiny.json").unlink()  # as after an interrupted write
    path.write_bytes(b"half")
    make_tiny_model(tmp_path)
    assert path.stat().st_size > 1000
    make_tiny_model(tmp_path, TinyConfig(dtype="bfloat16"))
    assert b'"BF16"' in path.read_bytes()[:2000]


def test_bfloat16_is_float32_rounded_to_nearest_even(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    load = pytest.importorskip("safetensors.torch").load_file
    exact = load(make_tiny_model(tmp_path / "f", TinyConfig()) / "model.safetensors")
    rounded = load(make_tiny_model(tmp_path / "b", TinyConfig(dtype="bfloat16")) / "model.safetensors")
    assert exact.keys() == rounded.keys()
    for name, tensor in exact.items():
        assert rounded[name].dtype == torch.bfloat16
        assert torch.equal(tensor.to(torch.bfloat16), rounded[name]), name
    weights = exact["model.layers.0.mlp.up_proj.weight"]
    assert float(weights.std()) == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize("text", ["Hello the world", "naïve – 你好 \U0001f600", "\x00\x7f tab\t\n"])
def test_the_tokenizer_takes_any_text(tmp_path: Path, text: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    make_tiny_model(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert all(FIRST_TEXT_ID <= token < VOCAB_SIZE for token in ids)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE


def test_chat_works(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    make_tiny_model(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<s><|system|>be<|end|><|user|>hi<|end|><|assistant|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == BOS_ID
    assert sum(token < len(SPECIAL) for token in ids) == 6


@pytest.mark.parametrize("wrong", [{"dtype": "int8"}, {"heads": 3}, {"vocab_size": 100}])
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TinyConfig(**wrong)  # type: ignore[arg-type]
