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
from vllm_suite.media import tokens, towers
from vllm_suite.media.config import UnknownModel
from vllm_suite.media.families import encoder_of, text_config

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
    tower: towers.Tower
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
    text = params.language(text_config(config))
    encoder = encoder_of(config, pixels)
    if encoder.image is None:
        raise UnknownModel(f"{name} takes no images")
    return Model(name, encoder.tower, text, encoder.image, encoder.output_values, tile_rows=encoder.tile_rows)


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
