"""What a tiny multimodal checkpoint is asked to be, and what a family module answers with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Family = Literal["qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "qwen2_audio"]
FAMILIES: tuple[Family, ...] = get_args(Family)
Shapes = dict[str, tuple[int, ...]]

HEAD_DIM = 32  # of the encoder and of the language model; vLLM's CPU attention knows it
MAX_POSITION = 8192


@dataclass(frozen=True)
class MediaConfig:
    """Sizes of the checkpoint. Equal values give equal files, byte for byte.

    `vision_layers` and `vision_hidden` are those of the encoder, also where it hears instead of sees: 12 layers of
    512 make the encoder the slow part of a request, the defaults make it cheap. Widths are multiples of 32.
    """

    family: Family
    seed: int = 0
    vision_layers: int = 2
    vision_hidden: int = 64
    text_layers: int = 2
    text_hidden: int = 128
    vocab_size: int = 528

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, not {self.family!r}")
        for name in ("vision_hidden", "text_hidden"):
            width = getattr(self, name)
            if width < 2 * HEAD_DIM or width % (2 * HEAD_DIM):
                raise ValueError(f"{name} must be a multiple of {2 * HEAD_DIM}, not {width}")
        for name in ("vision_layers", "text_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def vision_heads(self) -> int:
        return self.vision_hidden // HEAD_DIM

    @property
    def vision_inner(self) -> int:
        return 2 * self.vision_hidden

    @property
    def text_heads(self) -> int:
        return self.text_hidden // HEAD_DIM

    @property
    def text_kv_heads(self) -> int:
        return self.text_heads // 2


@dataclass(frozen=True)
class Blueprint:
    """A family's checkpoint before it is written.

    `tower` and `language` are the names and shapes of the weights of the encoder (with its projector) and of the
    language model; they go to separate files, so that an instance which needs one half reads one file. `files` are
    the further JSON files by name, `extra_tokens` what the processor asks the tokenizer for by attribute.
    """

    config: dict[str, Any]
    tower: Shapes
    language: Shapes
    files: dict[str, dict[str, Any]]
    placeholders: dict[str, str]
    extra_tokens: dict[str, str] = field(default_factory=dict)
    numbered: bool = False
