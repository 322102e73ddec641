"""The models of the EPD paper, its memory tables, and the same tables computed.

Paper: Singh and others, "Efficiently Serving Large Multimodal Models Using EPD Disaggregation", arXiv 2501.05460v4,
tables 2, 3 and 8 and section 4.3. The figures were transcribed from the paper by hand. Its table 3 was read as
(monolithic, encode, prefill): only this reading gives the 22 times larger batch that the abstract names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm_epd.memory_model import Gpu, Kind, Model, fits_window, from_config

SOURCE = "arXiv 2501.05460v4"
ASSUMPTIONS = (
    "the GPU has 80 GiB, of which the engine takes 90 %; float16 throughout",
    "a multimedia token cache for 3,000 tiles is reserved on every instance (the paper's appendix E.1)",
    "KV cache 80 % of what weights and token cache leave free (tables 2 and 3), none on an encoder",
    "activations: all tiles of a batch in one pass of the encoder, all tokens in one prefill without "
    "chunks; at their widest 2 h + 2 i values per patch and 5 h + 3 i per token (h width, i width of the MLP)",
    "the encoder's pixels and output are counted",
    "MiniCPM-V's encoder writes its attention scores (fp16, fp32, fp16), InternViT's does not",
    "`DistServe` holds encoder, language model and KV cache: the monolithic instance here",
    "no allocator losses, no workspace: real limits are lower",
)

RESOLUTIONS = ((313, 234), (787, 444), (4032, 3024))
IMAGES_8 = (5, 10, 20, 40, 80)
_BATCH_IMAGES = 10


def _intern_config(vision: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    shared_vision = {"image_size": 448, "patch_size": 14}
    shared_text = {"model_type": "internlm2", "vocab_size": 92_553, "max_position_embeddings": 32_768}
    return {
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "max_dynamic_patch": 12,
        "vision_config": shared_vision | vision,
        "llm_config": shared_text | text,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "MiniCPM-V 2.6": {
        "model_type": "minicpmv",
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 151_666,
        "max_position_embeddings": 32_768,
        "query_num": 64,
        "slice_config": {"max_slice_nums": 9, "scale_resolution": 448},
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 980,
            "patch_size": 14,
        },
    },
    "InternVL2-8B": _intern_config(
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "norm_type": "layer_norm",
            "qkv_bias": True,
            "qk_normalization": False,
        },
        {
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
    ),
    "InternVL2-26B": _intern_config(
        {
            "hidden_size": 3200,
            "intermediate_size": 12_800,
            "num_hidden_layers": 45,
            "num_attention_heads": 25,
            "norm_type": "rms_norm",
            "qkv_bias": False,
            "qk_normalization": True,
        },
        {
            "hidden_size": 6144,
            "intermediate_size": 16_384,
            "num_hidden_layers": 48,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "rope_scaling": {"type": "dynamic", "factor": 3.0},
        },
    ),
}
"""The keys that count, of the models' published config.json files."""

# Section 4.3: weights that an encode worker does without, in percent.
SAVED = {"MiniCPM-V 2.6": 95.0, "InternVL2-8B": 96.2, "InternVL2-26B": 78.3}

# Table 2: most images per request (monolithic, EPD) at each resolution.
TABLE_2 = {
    "MiniCPM-V 2.6": ((77, 490), (26, 165), (7, 49)),
    "InternVL2-8B": ((19, 19), (19, 19), (19, 19)),
    "InternVL2-26B": ((1, 10), (11, 45), (1, 10)),
}

# Table 3: largest batch of requests with ten images each (monolithic, encode, prefill); 0: out of memory.
TABLE_3 = {
    "MiniCPM-V 2.6": ((7, 49, 86), (2, 16, 29), (0, 4, 9)),
    "InternVL2-8B": ((2, 15, 2), (9, 67, 10), (2, 15, 2)),
    "InternVL2-26B": ((0, 6, 1), (1, 22, 4), (0, 6, 1)),
}

OOM, OOCL = "OOM", "OOCL"
# Table 8: largest KV cache, percent of free memory, at 4032 x 3024; cells the paper left empty are left out.
TABLE_8: dict[str, dict[Kind, tuple[int | str, ...]]] = {
    "MiniCPM-V 2.6": {"monolithic": (86, 74, 49, OOM, OOM), "prefill": (99, 97, 95, 92, OOCL)},
    "InternVL2-8B": {"monolithic": (94, 89, OOCL), "prefill": (95, 91, OOCL)},
    "InternVL2-26B": {"monolithic": (67, 36, OOM, OOM), "prefill": (89, 80, 63, OOCL)},
}


@dataclass(frozen=True)
class Cell:
    """One figure of the paper beside ours. `what` says which instance, `at` which resolution or how many images."""

    table: str
    model: str
    what: str
    at: str
    paper: float | str
    ours: float | str

    @property
    def in_points(self) -> bool:
        """Whether the figure is a percentage."""
        return self.table in ("4.3", "8")

    @property
    def deviation(self) -> float | None:
        """Ours over the paper's, less one; in points for percentages. None where the paper's is 0 or a word."""
        if isinstance(self.paper, str) or isinstance(self.ours, str):
            return None
        if self.in_points:
            return self.ours - self.paper
        return self.ours / self.paper - 1 if self.paper else None

    def within(self, tolerance: float) -> bool:
        """The same word, or numbers apart by at most that share, for percentages by 100 times that many points."""
        if self.deviation is None:
            return self.paper == self.ours
        return abs(self.deviation) <= tolerance * (100 if self.in_points else 1) + 1e-9


def models() -> dict[str, Model]:
    """The paper's models by name."""
    found = {name: from_config(config, name) for name, config in CONFIGS.items()}
    scores = "MiniCPM-V 2.6"
    return found | {scores: dataclasses.replace(found[scores], writes_scores=True)}


def cells(gpu: Gpu | None = None) -> Iterator[Cell]:
    """Every figure of section 4.3 and of the tables 2, 3 and 8, with ours."""
    gpu = gpu or Gpu()
    for name, model in models().items():
        share = 100 * (1 - model.encoder / model.parameters("monolithic"))
        yield Cell("4.3", name, "weights an encoder saves, %", "", SAVED[name], round(share, 1))
        for resolution, paper2, paper3 in zip(RESOLUTIONS, TABLE_2[name], TABLE_3[name], strict=True):
            at = f"{resolution[0]}x{resolution[1]}"
            one, apart = most_images(gpu, model, resolution)
            yield Cell("2", name, "monolithic", at, paper2[0], one)
            yield Cell("2", name, "EPD", at, paper2[1], apart)
            kinds: tuple[Kind, ...] = ("monolithic", "encode", "prefill")
            for kind, paper in zip(kinds, paper3, strict=True):
                yield Cell("3", name, kind, at, paper, most_requests(gpu, model, kind, resolution))
        for kind, row in TABLE_8[name].items():
            for images, published in zip(IMAGES_8, row, strict=False):
                yield Cell("8", name, kind, f"{images} images", published, _kv(gpu, model, kind, images))


def most_images(gpu: Gpu, model: Model, resolution: tuple[int, int]) -> tuple[int, int]:
    """Most images of one request: on a monolithic instance, and on an encoder and a prefill instance together."""
    window = fits_window(model, resolution)
    one, encode, prefill = (gpu.images(model, kind, resolution) for kind in ("monolithic", "encode", "prefill"))
    return min(window, one), min(window, encode, prefill)


def most_requests(gpu: Gpu, model: Model, kind: Kind, resolution: tuple[int, int]) -> int:
    """Largest batch of requests with ten images each."""
    return gpu.images(model, kind, resolution, batch=_BATCH_IMAGES)


def _kv(gpu: Gpu, model: Model, kind: Kind, images: int) -> float | str:
    if images > fits_window(model, RESOLUTIONS[-1]):
        # The paper writes what it met first: a monolithic instance runs out of memory on the way there.
        fits = gpu.kv_percent(model, kind, RESOLUTIONS[-1], images) is not None
        return OOCL if fits or kind == "prefill" else OOM
    percent = gpu.kv_percent(model, kind, RESOLUTIONS[-1], images)
    return OOM if percent is None else round(percent)
