"""The tiny multimodal checkpoints as files: what another process must find in them."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from vllm_suite.fleet.tiny_media import FAMILIES, Family, MediaConfig, make_tiny_media, write
from vllm_suite.fleet.tiny_media.__main__ import main
from vllm_suite.fleet.tiny_media.tokenizer import MEDIA_TOKENS, special_ids, token_id
from vllm_suite.fleet.tiny_tokenizer import VOCAB_SIZE

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

MODELS = {
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen3_vl": "Qwen3VL",
    "internvl": "InternVL",
    "llava_onevision": "LlavaOnevision",
    "qwen2_audio": "Qwen2Audio",
}


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def load(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_values_give_equal_files_and_the_seed_changes_only_the_weights(family: Family, tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    write(family, one)
    write(family, same)
    write(family, other, seed=1)
    assert digests(one) == digests(same)
    changed = {name for name, digest in digests(other).items() if digests(one)[name] != digest}
    assert changed == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tiny_media.json"}
    assert sum(file.stat().st_size for file in one.iterdir()) < 10_000_000


@pytest.mark.parametrize("family", FAMILIES)
def test_the_index_puts_the_encoder_and_the_language_model_into_files_of_their_own(
    family: Family, tmp_path: Path
) -> None:
    write(family, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    tensors = load(tmp_path)
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    first, second = ({n for n, file in index["weight_map"].items() if str(i) in file[:12]} for i in (1, 2))
    assert all("embed_tokens" not in name and "lm_head" not in name for name in first)
    assert {name for name in second if "lm_head" in name}
    assert not any(part in name for name in second for part in ("visual", "tower", "projector"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_have_the_shapes_that_transformers_has_for_the_configuration(
    family: Family, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    torch = importlib.import_module("torch")
    make_tiny_media(tmp_path, MediaConfig(family, vision_layers=3, vision_hidden=128))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = getattr(transformers, f"{MODELS[family]}ForConditionalGeneration")(config)
    want = sorted((tuple(value.shape), _last(name)) for name, value in model.state_dict().items())
    assert sorted((tensor.shape, _last(name)) for name, tensor in load(tmp_path).items()) == want


def _last(name: str) -> str:
    """A weight's name without the prefixes that differ between published checkpoints and transformers 5."""
    return ".".join(name.removeprefix("model.").split(".")[-2:])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_processor_is_built_from_the_folder_alone(family: Family, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write(family, tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    kinds = ["audio"] if family == "qwen2_audio" else ["image", "video"]
    parts = [{"type": "text", "text": "see"}, *({"type": kind} for kind in kinds), {"type": kinds[0]}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    assert text.startswith("<s><|user|>see")
    assert text.endswith("<|end|><|assistant|>")
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    media = {processor.tokenizer.convert_tokens_to_ids(token) for token in MEDIA_TOKENS}
    assert media == {token_id(token) for token in MEDIA_TOKENS}
    assert len([i for i in ids if i in media]) >= 1 + len(kinds)
    # Plain text has the tokens of the text checkpoint's tokenizer.
    plain = processor.tokenizer("A wider pipe, 7 of it.", add_special_tokens=False)["input_ids"]
    assert max(plain) < VOCAB_SIZE
    assert processor.tokenizer.decode(plain) == "A wider pipe, 7 of it."


def test_the_checkpoint_never_prefers_a_token_that_is_no_text(tmp_path: Path) -> None:
    head = load(write("qwen2_5_vl", tmp_path))["lm_head.weight"]
    special = [i for i in special_ids() if i < len(head)]
    assert not head[special].any()
    assert head[[i for i in range(len(head)) if i not in special]].any(axis=1).all()


def test_a_folder_is_written_once_and_again_for_other_values(tmp_path: Path) -> None:
    write("internvl", tmp_path)
    before = (tmp_path / "config.json").stat().st_mtime_ns
    write("internvl", tmp_path)
    assert (tmp_path / "config.json").stat().st_mtime_ns == before
    write("internvl", tmp_path, vision_layers=4)
    assert json.loads((tmp_path / "config.json").read_text())["vision_config"]["num_hidden_layers"] == 4
    # A write that was interrupted has no stamp and is done again.
    (tmp_path / "tiny_media.json").unlink()
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"half")
    write("internvl", tmp_path, vision_layers=4)
    assert load(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"family": "llava"}, "family must be one of"),
        ({"family": "internvl", "vision_hidden": 100}, "vision_hidden must be a multiple of 64"),
        ({"family": "internvl", "vision_layers": 0}, "vision_layers must be at least 1"),
    ],
)
def test_sizes_that_no_engine_takes_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MediaConfig(**sizes)


def test_the_command_writes_an_encoder_of_the_asked_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--family", "qwen3_vl", str(out), "--vision-layers", "5", "--vision-hidden", "128"]
    assert main(arguments) == 0
    assert "qwen3_vl" in capsys.readouterr().out
    vision = json.loads((out / "config.json").read_text())["vision_config"]
    assert (vision["depth"], vision["hidden_size"], vision["deepstack_visual_indexes"]) == (5, 128, [2, 3, 4])
    with pytest.raises(SystemExit):
        main(["--family", "qwen3_vl", str(out), "--vision-hidden", "65"])
