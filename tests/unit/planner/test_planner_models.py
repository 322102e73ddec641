"""Models from their configs: published parameter counts, cache, quantisation, SwiftKV, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllm_suite.media.config import UnknownModel
from vllm_suite.planner.models import ModelError, Parallel, Quantization, described, load, names
from vllm_suite.planner.models.catalog import known_config
from vllm_suite.planner.models.memory import kv_bytes, kv_bytes_per_token
from vllm_suite.planner.models.quant import quantization_of
from vllm_suite.planner.models.swiftkv import prefill_only, with_swiftkv

# Parameters as the Hugging Face pages or the models' own reports give them. DeepSeek-V3 and Kimi-K2 are counted without
# the multi-token-prediction layer and without the scales of their FP8 weights.
PUBLISHED = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Large-Instruct-2407": 122_610_069_504,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-v0.1": 140_620_634_112,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "deepseek-ai/DeepSeek-V3": 671_026_419_200,
    "moonshotai/Kimi-K2-Instruct": 1_026_408_232_448,
    "openai/gpt-oss-20b": 20_914_757_184,
    "openai/gpt-oss-120b": 116_829_156_672,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-27b-it": 27_432_406_640,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen2.5-VL-72B-Instruct": 73_410_777_344,
    "OpenGVLab/InternVL2-26B": 25_514_186_112,
    "facebook/opt-13b": 12_853_473_280,
}
ACTIVE = {  # billions, as the model reports round them
    "openai/gpt-oss-20b": 3.61,
    "openai/gpt-oss-120b": 5.13,
    "Qwen/Qwen3-235B-A22B": 21.6,
    "mistralai/Mixtral-8x7B-v0.1": 12.7,
}
AUDIO: dict[str, Any] = {
    "model_type": "qwen2_audio",
    "audio_config": {"d_model": 1280, "encoder_layers": 32, "encoder_ffn_dim": 5120, "encoder_attention_heads": 20,
                     "num_mel_bins": 128, "max_source_positions": 1500},
    "text_config": {"model_type": "qwen2", "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
                    "num_attention_heads": 32, "vocab_size": 156_032, "max_position_embeddings": 8192},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str) -> None:
    model = load(name).model
    assert model.params == PUBLISHED[name]
    assert model.assumed == ()


def test_active_parameters_are_those_of_the_reports() -> None:
    for name, billions in ACTIVE.items():
        assert load(name).model.active_params / 1e9 == pytest.approx(billions, rel=5e-3), name


def test_sound_is_encoded_in_pieces_of_thirty_seconds() -> None:
    model = described(AUDIO, "Qwen2-Audio-7B").model
    assert model.params == 8_397_094_912
    assert model.encoder is not None
    assert model.encoder.sound is not None
    short, long = model.encoder.sound(10.0), model.encoder.sound(45.0)
    assert (short.tiles, short.tokens, long.tiles, long.tokens) == (1, 250, 2, 1125)
    assert model.encoder.tower.flops(long) > 1.99 * model.encoder.tower.flops(short)


def test_videos_are_frames() -> None:
    qwen, intern = (load(name).model.encoder for name in ("Qwen/Qwen2.5-VL-7B-Instruct", "OpenGVLab/InternVL2-26B"))
    assert qwen is not None
    assert intern is not None
    # Two frames of 644 x 476 share 23 x 17 tokens; InternVL takes 256 for each frame, whatever its size.
    assert (qwen.video(8, 640, 480).tokens, qwen.video(7, 640, 480).tokens) == (4 * 23 * 17, 4 * 23 * 17)
    assert (intern.video(8, 640, 480).tokens, intern.video(8, 640, 480).tiles) == (8 * 256, 8)
    sound = described(AUDIO, "Qwen2-Audio-7B").model.encoder
    assert sound is not None
    with pytest.raises(UnknownModel, match="no videos"):
        sound.video(8, 640, 480)


def test_every_model_of_the_table_is_read() -> None:
    assert set(PUBLISHED) <= set(names())
    for name in names():
        loaded = load(name)
        assert loaded.model.params > loaded.model.embedding
        assert kv_bytes_per_token(loaded.model, loaded.stored, Parallel()) > 0


@pytest.mark.parametrize(
    ("name", "dtype", "kv", "bytes_per_token"),
    [
        # 2 x layers x KV heads x head x bytes
        ("meta-llama/Llama-3.1-70B", "bfloat16", "auto", 2 * 80 * 8 * 128 * 2),
        ("meta-llama/Llama-3.1-70B", "bfloat16", "fp8", 2 * 80 * 8 * 128),
        # DeepSeek-V3 report: 70 KB per token; (512 + 64) x 61 layers x 2 bytes
        ("deepseek-ai/DeepSeek-V3", "bfloat16", "auto", 576 * 61 * 2),
        ("facebook/opt-66b", "float16", "auto", 2 * 64 * 9216 * 2),
    ],
)
def test_cache_per_token(name: str, dtype: str, kv: str, bytes_per_token: int) -> None:
    quant = Quantization.named(dtype, kv=kv)
    assert kv_bytes_per_token(load(name).model, quant, Parallel()) == bytes_per_token


def test_int8_cache_keeps_a_scale_for_each_head() -> None:
    quant = Quantization.named("bfloat16", kv="int8")
    assert kv_bytes_per_token(load("Qwen/Qwen3-8B").model, quant, Parallel()) == 36 * 2 * 8 * (128 + 4)


def test_a_sliding_window_closes() -> None:
    quant = Quantization()
    model = load("openai/gpt-oss-20b").model
    layer = 2 * 8 * 64 * 2
    # 12 of 24 layers have a window of 128 tokens, which touches at most 9 blocks of 16.
    assert kv_bytes(model, quant, Parallel(), 4096) == 12 * layer * 4096 + 12 * layer * 9 * 16
    assert kv_bytes(model, quant, Parallel(), 40) == 24 * layer * 48
    gemma = load("google/gemma-3-27b-it").model
    assert sum(each.attention is not None and each.attention.window == 1024 for each in gemma.layers) == 52
    assert gemma.layers[5].attention is not None
    assert gemma.layers[5].attention.window is None


def test_which_layers_have_a_window() -> None:
    def windows(**change: Any) -> list[int | None]:
        layers = described(known_config("Qwen/Qwen2.5-7B-Instruct") | change, "x").model.layers
        return [layer.attention.window for layer in layers if layer.attention]

    assert windows(sliding_window=4096, use_sliding_window=False) == [None] * 28
    assert windows(sliding_window=4096, max_window_layers=20) == [None] * 20 + [4096] * 8
    assert windows(sliding_window=4096, sliding_window_pattern=2) == [4096, None] * 14


def test_swiftkv_sizes_are_those_of_the_plugin() -> None:
    sizes_of = pytest.importorskip("vllm_swiftkv.sizes").sizes
    for name, cut, group in (("meta-llama/Llama-3.1-8B", 16, 4), ("Qwen/Qwen3-8B", 20, 1), ("Qwen/Qwen3-8B", 20, 4),
                             ("Qwen/Qwen3-30B-A3B", 24, 2), ("Qwen/Qwen2.5-7B-Instruct", 14, 2)):  # fmt: skip
        config = {"tie_word_embeddings": False, **known_config(name)}
        theirs = sizes_of(config, cut, group)
        ours = with_swiftkv(load(name).model, cut, group)
        assert ours.params == theirs.swiftkv, name
        assert prefill_only(ours).params == theirs.prefill_only, name
        assert ours.kv_values() == prefill_only(ours).kv_values() == theirs.kv_swiftkv, name


def test_a_swiftkv_config_is_read_as_one() -> None:
    config = known_config("Qwen/Qwen3-8B") | {
        "model_type": "qwen3_swiftkv", "num_key_value_layers": 20, "key_value_group_size": 4,
    }  # fmt: skip
    assert described(config, "x").model.layers == with_swiftkv(load("Qwen/Qwen3-8B").model, 20, 4).layers
    with pytest.raises(ModelError, match="group 3 does not divide"):
        with_swiftkv(load("Qwen/Qwen3-8B").model, 20, 3)
    with pytest.raises(ModelError, match="only grouped-query"):
        with_swiftkv(load("deepseek-ai/DeepSeek-V3").model, 20)


def test_a_folder_with_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(known_config("Qwen/Qwen2.5-VL-7B-Instruct")))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 3136, "max_pixels": 200_704}))
    model = load(str(tmp_path)).model
    assert model.params == PUBLISHED["Qwen/Qwen2.5-VL-7B-Instruct"]
    assert model.encoder is not None
    assert model.encoder.image is not None
    assert model.encoder.image(1920, 1080).tokens <= 200_704 // 28**2


def test_what_is_assumed_is_said() -> None:
    plain = known_config("meta-llama/Llama-3.1-8B")
    model = described(plain | {"model_type": "newcomer"}, "x").model
    assert model.params == PUBLISHED["meta-llama/Llama-3.1-8B"]
    assert "newcomer" in model.assumed[0]
    model = described(plain | {"vision_config": {"hidden_size": 1}}, "x").model
    assert "left out" in model.assumed[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mamba_d_state": 128}, "not plain attention"),
        ({"sliding_window": 64, "layer_types": ["linear_attention"] * 32}, "linear_attention are not modelled"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"quantization_config": {"quant_method": "odd"}}, "odd' is not known"),
    ],
)
def test_what_cannot_be_described_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        described(known_config("meta-llama/Llama-3.1-8B") | change, "x")


def test_an_unknown_name_is_refused_with_what_is_close(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"did you mean Qwen/Qwen3-8B\?"):
        load("qwen3-8b")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        load(str(tmp_path))


def test_quantisation_of_checkpoints() -> None:
    def read(**found: Any) -> Quantization:
        return quantization_of({"quantization_config": found}, "bfloat16")

    linear = load("openai/gpt-oss-20b").model.layers[0].linears
    router, experts = (next(each for each in linear if each.name == name) for name in ("router", "experts_down"))
    block = read(quant_method="fp8", weight_block_size=[128, 128])
    assert block.of(experts).bits == pytest.approx(8.00195, abs=1e-5)
    assert (block.compute(experts), block.compute(router)) == ("fp8", "bf16")
    four = read(quant_method="awq", bits=4)
    assert (four.of(experts).bits, four.compute(experts)) == (4.15625, "bf16")
    assert Quantization.named("float16", "int4").compute(experts) == "fp16"
    mx = read(quant_method="mxfp4")
    assert (mx.of(experts).bits, mx.of(linear[0]).bits, mx.compute(experts)) == (4.25, 16, "bf16")
    w8a8 = read(quant_method="compressed-tensors", config_groups={"a": {
        "weights": {"type": "int", "num_bits": 8}, "input_activations": {"num_bits": 8}}})  # fmt: skip
    assert w8a8.compute(experts) == "int8"
    assert replace(w8a8, activations="bf16").compute(experts) == "bf16"
    with pytest.raises(ModelError, match="kv is one of"):
        Quantization(kv="fp3")
