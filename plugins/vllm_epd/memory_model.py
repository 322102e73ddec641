"""What each kind of instance holds of a multimodal model, and how many images fit beside it on a GPU.

A GPU's usable memory is a share of it. Weights and the multimedia token cache are taken off; of what is free a share
goes to the KV cache, on instances that have one, and the rest holds activations: of the encoder over all tiles of a
batch at once, then of the prefill over all its tokens at once (no chunks). Only the larger of the two counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vllm_epd import memory_params as params
from vllm_epd import memory_tokens as tokens

Kind = Literal["monolithic", "encode", "prefill"]
KINDS: tuple[Kind, ...] = ("monolithic", "encode", "prefill")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}


@dataclass(frozen=True)
class Model:
    """Sizes of a multimodal model.

    Attributes:
        output_values: values per row of the encoder's output, deep-stack features among them.
        tile_rows: rows of the encoder's output for one tile; 256 where an image is not cut into tiles.
        writes_scores: the encoder's attention writes scores, as plain matrix products do: once in the model's type,
            once as float32 for the softmax, and once converted back.
    """

    name: str
    tower: params.Tower
    language: params.Language
    image: tokens.Rule
    output_values: int
    tile_rows: int = 256
    writes_scores: bool = False

    @property
    def encoder(self) -> int:
        """Parameters of the encoder: tower and projector."""
        return self.tower.params + self.tower.projector

    def parameters(self, kind: Kind) -> int:
        """Parameters that an instance of that kind holds."""
        if kind == "encode":
            return self.encoder
        return self.language.params + (self.encoder if kind == "monolithic" else 0)

    def encode_bytes(self, cost: tokens.ImageCost, value: int) -> int:
        """Activations of one image at the encoder's peak, its pixels and its output included; `value` bytes each."""
        each = self.tower.peak * cost.patches * value
        if self.writes_scores:
            # Queries, keys, values, the residual, the normed input and the output are alive beside the scores.
            scores = self.tower.heads * cost.patches**2 * (2 * value + 4)
            each = scores + 6 * self.tower.hidden * cost.patches * value
        pixels = self.tower.pixels * cost.patches * value
        return cost.tiles * (each + pixels) + cost.tokens * self.output_values * value

    def image_bytes(self, width: int, height: int, value: int) -> int:
        """Bytes of one image's encoder output: what goes from an encoder to a prefill instance."""
        return self.image(width, height).tokens * self.output_values * value


def from_config(config: Mapping[str, Any], name: str, pixels: tuple[int, int] | None = None) -> Model:
    """Sizes for a ``config.json``.

    Args:
        pixels: least and most pixels of a Qwen processor, in place of the family's usual ones.

    Raises:
        UnknownModel: another family, or a config without a needed key.
    """
    kind = params.model_type(config)
    make = _FAMILIES.get(kind)
    if make is None:
        raise params.UnknownModel(f"model type {kind} is not known; known: {', '.join(sorted(_FAMILIES))}")
    return make(config, name, pixels)


def _qwen(config: Mapping[str, Any], name: str, pixels: tuple[int, int] | None) -> Model:
    third = params.model_type(config) == "qwen3_vl"
    # Files that transformers writes leave out what is the family's default.
    usual = {"patch_size": 16 if third else 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision = {**usual, **params.section(config, "vision_config")}
    # Older files hold the text model's keys at the top.
    text = {**config, **config.get("text_config", {})}
    text.setdefault("tie_word_embeddings", False)
    out = params.number(vision, "out_hidden_size")
    patch, merge = params.number(vision, "patch_size"), params.number(vision, "spatial_merge_size")
    least, most = pixels or ((65_536, 16_777_216) if third else (3_136, 12_845_056))
    layers = 1 + len(vision.get("deepstack_visual_indexes", ()))
    return Model(
        name,
        params.qwen_tower(vision, out),
        params.language(text),
        tokens.qwen(patch, merge, least, most),
        out * layers,
    )


def _intern(config: Mapping[str, Any], name: str, pixels: tuple[int, int] | None) -> Model:
    vision = params.section(config, "vision_config")
    text = params.language(_tied(config, params.section(config, "llm_config", "text_config")))
    merge = round(1 / float(config.get("downsample_ratio", 0.5)))
    tower = params.intern_tower(vision, text.hidden, merge)
    size, patch = params.side(vision.get("image_size")), params.side(vision.get("patch_size"))
    grid = (size // patch) ** 2
    most = params.number({"max_dynamic_patch": 12, **config}, "max_dynamic_patch")
    rule = tokens.intern(size, 1 + grid, grid // merge**2, most)
    return Model(name, tower, text, rule, text.hidden, tile_rows=grid // merge**2)


def _minicpm(config: Mapping[str, Any], name: str, pixels: tuple[int, int] | None) -> Model:
    vision, slices = params.section(config, "vision_config"), params.section(config, "slice_config")
    text = params.language(config)
    rows, inner = params.number(config, "query_num"), params.number(vision, "hidden_size")
    # The resampler: queries attend to the patches, norms on both sides, and one more product.
    resampler = rows * text.hidden + params.linear(inner, text.hidden, bias=False)
    resampler += params.linear(text.hidden, 3 * text.hidden) + params.linear(text.hidden, text.hidden)
    resampler += 6 * text.hidden + text.hidden**2
    size, patch = params.number(slices, "scale_resolution"), params.number(vision, "patch_size")
    rule = tokens.minicpm(size, patch, rows, params.number(slices, "max_slice_nums"))
    return Model(name, params.siglip_tower(vision, resampler), text, rule, text.hidden, tile_rows=rows)


def _llava(config: Mapping[str, Any], name: str, pixels: tuple[int, int] | None) -> Model:
    vision = params.section(config, "vision_config")
    text = params.language(_tied(config, params.section(config, "text_config")))
    projector = params.linear(params.number(vision, "hidden_size"), text.hidden)
    projector += params.linear(text.hidden, text.hidden)
    size, patch = params.side(vision.get("image_size")), params.side(vision.get("patch_size"))
    make = params.siglip_tower if params.model_type(vision).startswith("siglip") else params.clip_tower
    grid = (size // patch) ** 2
    rule = tokens.fixed(grid + (make is params.clip_tower), grid)
    if params.model_type(config) == "llava_onevision":
        projector += text.hidden  # the token that ends a row
        most = int(str(config.get("vision_aspect_ratio", "anyres_max_9")).removeprefix("anyres_max_"))
        rule = tokens.anyres(config.get("image_grid_pinpoints", ()), size, patch, most)
    return Model(name, make(vision, projector), text, rule, text.hidden, tile_rows=grid)


def _tied(config: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    return {**text, "tie_word_embeddings": tied}


_FAMILIES = {
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "internvl": _intern,
    "internvl_chat": _intern,
    "minicpmv": _minicpm,
    "llava": _llava,
    "llava_onevision": _llava,
}


@dataclass(frozen=True)
class Gpu:
    """A GPU and how its memory is divided.

    Attributes:
        bytes: memory of the GPU.
        usable: share of it that the engine may take.
        kv_share: share for the KV cache of what is free beside weights and token cache.
        cache_tiles: tiles that the multimedia token cache holds; 0 for none.
        value: bytes per weight, activation and cache element.
    """

    bytes: int = 80 * 2**30
    usable: float = 0.9
    kv_share: float = 0.8
    cache_tiles: int = 3000
    value: int = 2

    def free(self, model: Model, kind: Kind) -> float:
        """Bytes beside weights and token cache; negative where the weights alone do not fit."""
        cache = self.cache_tiles * model.tile_rows * model.output_values * self.value
        return self.bytes * self.usable - model.parameters(kind) * self.value - cache

    def images(self, model: Model, kind: Kind, resolution: tuple[int, int], batch: int = 1) -> int:
        """Most images per request where `batch` requests run at once; windows are not looked at. 0 for none."""
        left = self.free(model, kind) * (1.0 if kind == "encode" else 1 - self.kv_share)
        return max(0, int(left // (batch * self.activations(model, kind, resolution))))

    def activations(self, model: Model, kind: Kind, resolution: tuple[int, int]) -> int:
        """Bytes that one image adds to the peak of an instance."""
        cost = model.image(*resolution)
        encode = model.encode_bytes(cost, self.value)
        prefill = cost.prompt_tokens * model.language.peak * self.value
        return {"monolithic": max(encode, prefill), "encode": encode, "prefill": prefill}[kind]

    def kv_percent(self, model: Model, kind: Kind, resolution: tuple[int, int], images: int) -> float | None:
        """Most KV cache, in percent of free memory, that leaves room for that request; None where it does not fit."""
        free = self.free(model, kind)
        left = free - images * self.activations(model, kind, resolution)
        return 100 * left / free if left > 0 else None


def fits_window(model: Model, resolution: tuple[int, int]) -> int:
    """Most images whose tokens fit the model's window."""
    return model.language.window // model.image(*resolution).prompt_tokens
