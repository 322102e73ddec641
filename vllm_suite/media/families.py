"""The families of multimodal models whose encoders are known, each from its ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_suite.media import tokens, towers
from vllm_suite.media.config import Config, UnknownModel, model_type, number, section, side


@dataclass(frozen=True)
class Encoder:
    """An encoder and what it makes of one item.

    Attributes:
        image: width and height in pixels to tiles, patches and tokens; None where the model takes no images.
        output_values: values per row of the encoder's output, deep-stack features among them.
        tile_rows: rows of the encoder's output for one tile; 256 where an image is not cut into tiles.
        frame: the same for one frame of a video; None where the model takes no videos.
        frames: frames that the tower takes together.
        sound: seconds of sound to its cost; None where the model takes none.
    """

    tower: towers.Tower
    image: tokens.Rule | None
    output_values: int
    tile_rows: int = 256
    frame: tokens.Rule | None = None
    frames: int = 1
    sound: tokens.SoundRule | None = None

    @property
    def params(self) -> int:
        """Parameters of tower and projector."""
        return self.tower.params + self.tower.projector

    def video(self, frames: int, width: int, height: int) -> tokens.ImageCost:
        """The cost of a video of so many sampled frames. Raises UnknownModel where the model takes none."""
        if self.frame is None:
            raise UnknownModel("the model takes no videos")
        one, groups = self.frame(width, height), -(-frames // self.frames)
        return tokens.ImageCost(one.tiles * groups, one.patches, one.tokens * groups, one.extra)


def encoder_of(config: Config, pixels: tuple[int, int] | None = None) -> Encoder:
    """The encoder of a ``config.json``.

    Args:
        pixels: least and most pixels of a Qwen processor, in place of the family's usual ones.

    Raises:
        UnknownModel: another family, or a config without a needed key.
    """
    return _FAMILIES[_known(config)](config, pixels)


def has_encoder(config: Config) -> bool:
    """Whether the config is of a family whose encoder is known."""
    return config.get("model_type") in _FAMILIES


def _known(config: Config) -> str:
    kind = model_type(config)
    if kind not in _FAMILIES:
        raise UnknownModel(f"model type {kind} is not known; known: {', '.join(sorted(_FAMILIES))}")
    return kind


def _qwen(config: Config, pixels: tuple[int, int] | None) -> Encoder:
    third = model_type(config).startswith("qwen3_vl")
    # Files that transformers writes leave out what is the family's default.
    usual = {"patch_size": 16 if third else 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision = {**usual, **section(config, "vision_config")}
    out = number(vision, "out_hidden_size")
    patch, merge = number(vision, "patch_size"), number(vision, "spatial_merge_size")
    least, most = pixels or ((65_536, 16_777_216) if third else (3_136, 12_845_056))
    layers = 1 + len(vision.get("deepstack_visual_indexes", ()))
    rule = tokens.qwen(patch, merge, least, most)
    # Frames of Qwen2.5-VL have limits of their own, 128 to 768 squares of 28 x 28 pixels.
    frame = rule if third else tokens.qwen(patch, merge, 128 * 28**2, 768 * 28**2)
    tower, together = towers.qwen_tower(vision, out), number(vision, "temporal_patch_size")
    return Encoder(tower, rule, out * layers, frame=frame, frames=together)


def _intern(config: Config, _: tuple[int, int] | None) -> Encoder:
    vision = section(config, "vision_config")
    hidden = number(section(config, "llm_config", "text_config"), "hidden_size")
    merge = round(1 / float(config.get("downsample_ratio", 0.5)))
    tower = towers.intern_tower(vision, hidden, merge)
    size, patch = side(vision.get("image_size")), side(vision.get("patch_size"))
    grid = (size // patch) ** 2
    most = number({"max_dynamic_patch": 12, **config}, "max_dynamic_patch")
    rule = tokens.intern(size, 1 + grid, grid // merge**2, most)
    # A frame is one tile.
    frame = tokens.fixed(1 + grid, grid // merge**2, extra=2)
    return Encoder(tower, rule, hidden, tile_rows=grid // merge**2, frame=frame)


def _minicpm(config: Config, _: tuple[int, int] | None) -> Encoder:
    vision, slices = section(config, "vision_config"), section(config, "slice_config")
    hidden = number(config, "hidden_size")
    rows, inner = number(config, "query_num"), number(vision, "hidden_size")
    # The resampler: queries attend to the patches, norms on both sides, and one more product.
    resampler = rows * hidden + towers.linear(inner, hidden, bias=False)
    resampler += towers.linear(hidden, 3 * hidden) + towers.linear(hidden, hidden)
    resampler += 6 * hidden + hidden**2
    size, patch = number(slices, "scale_resolution"), number(vision, "patch_size")
    rule = tokens.minicpm(size, patch, rows, number(slices, "max_slice_nums"))
    frame = tokens.fixed((size // patch) ** 2, rows, extra=2)
    return Encoder(towers.siglip_tower(vision, resampler), rule, hidden, tile_rows=rows, frame=frame)


def _llava(config: Config, _: tuple[int, int] | None) -> Encoder:
    vision = section(config, "vision_config")
    hidden = number(section(config, "text_config"), "hidden_size")
    projector = towers.linear(number(vision, "hidden_size"), hidden) + towers.linear(hidden, hidden)
    size, patch = side(vision.get("image_size")), side(vision.get("patch_size"))
    make = towers.siglip_tower if model_type(vision).startswith("siglip") else towers.clip_tower
    grid = (size // patch) ** 2
    rule, frame = tokens.fixed(grid + (make is towers.clip_tower), grid), None
    if model_type(config) == "llava_onevision":
        projector += hidden  # the token that ends a row
        most = int(str(config.get("vision_aspect_ratio", "anyres_max_9")).removeprefix("anyres_max_"))
        rule = tokens.anyres(config.get("image_grid_pinpoints", ()), size, patch, most)
        # Features of a frame are pooled to half the side.
        frame = tokens.fixed(grid, math.ceil(size // patch / 2) ** 2)
    return Encoder(make(vision, projector), rule, hidden, tile_rows=grid, frame=frame)


def _gemma3(config: Config, _: tuple[int, int] | None) -> Encoder:
    vision = section(config, "vision_config")
    hidden, inner = number(section(config, "text_config"), "hidden_size"), number(vision, "hidden_size")
    rows = number({"mm_tokens_per_image": 256, **config}, "mm_tokens_per_image")
    grid = (side(vision.get("image_size")) // side(vision.get("patch_size"))) ** 2
    # A norm and one product after pooling; without pan and scan an image is one square.
    tower = towers.siglip_tower(vision, inner + towers.linear(inner, hidden, bias=False))
    return Encoder(tower, tokens.fixed(grid, rows, extra=2), hidden, tile_rows=rows)


def _qwen_audio(config: Config, _: tuple[int, int] | None) -> Encoder:
    audio = section(config, "audio_config")
    hidden = number(section(config, "text_config"), "hidden_size")
    positions = number(audio, "max_source_positions")
    return Encoder(towers.whisper_tower(audio, hidden), None, hidden, sound=tokens.whisper(positions, pool=2))


_FAMILIES = {
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "qwen3_vl_moe": _qwen,
    "internvl": _intern,
    "internvl_chat": _intern,
    "minicpmv": _minicpm,
    "llava": _llava,
    "llava_onevision": _llava,
    "gemma3": _gemma3,
    "qwen2_audio": _qwen_audio,
}


def text_config(config: Config) -> dict[str, Any]:
    """The language model's keys of a multimodal config, with whether the output head is the embedding."""
    kind = _known(config)
    if kind == "minicpmv":
        return dict(config)
    if kind.startswith("qwen"):
        # Older files hold the text model's keys at the top.
        found = config.get("text_config")
        text = {**config, **(found if isinstance(found, Mapping) else {})}
        text.setdefault("tie_word_embeddings", False)
        return text
    text = dict(section(config, "llm_config", "text_config"))
    text["tie_word_embeddings"] = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    return text
