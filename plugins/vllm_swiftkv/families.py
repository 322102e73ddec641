"""The model families that have a SwiftKV form, and how a SwiftKV model's layers are split.

No torch, no vLLM: the converter, the trainer, the serving classes and the planner read the same tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class SwiftKVError(ValueError):
    """A model or a setting that SwiftKV cannot work with. The text is meant for the person who gave it."""


@dataclass(frozen=True)
class Family:
    """One family of decoder-only models.

    Attributes:
        base_model_type: ``model_type`` of the ordinary model's ``config.json``; the SwiftKV form's is
            ``<base_model_type>_swiftkv``.
        base_architecture: class name in the ordinary model's ``architectures``.
        architecture: class name of the SwiftKV form.
        qkv_bias: True or False where the family always or never has biases on q, k and v; None where
            ``attention_bias`` of the config decides.
        qk_norm: q and k are RMS-normalised per head before RoPE (``q_norm``, ``k_norm``).
        moe: the MLP is a mixture of experts.
    """

    base_model_type: str
    base_architecture: str
    architecture: str
    qkv_bias: bool | None = None
    qk_norm: bool = False
    moe: bool = False

    @property
    def model_type(self) -> str:
        return f"{self.base_model_type}_swiftkv"

    def has_qkv_bias(self, config: Any) -> bool:
        """Whether q, k and v projections of this model carry biases."""
        return bool(getattr(config, "attention_bias", False)) if self.qkv_bias is None else self.qkv_bias


FAMILIES: tuple[Family, ...] = (
    Family("llama", "LlamaForCausalLM", "LlamaSwiftKVForCausalLM"),
    Family("mistral", "MistralForCausalLM", "MistralSwiftKVForCausalLM", qkv_bias=False),
    Family("qwen2", "Qwen2ForCausalLM", "Qwen2SwiftKVForCausalLM", qkv_bias=True),
    Family("qwen3", "Qwen3ForCausalLM", "Qwen3SwiftKVForCausalLM", qk_norm=True),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeSwiftKVForCausalLM", qk_norm=True, moe=True),
)


def of_model_type(model_type: str) -> Family:
    """The family whose ordinary or SwiftKV ``model_type`` this is. Raises SwiftKVError for any other."""
    for family in FAMILIES:
        if model_type in (family.base_model_type, family.model_type):
            return family
    known = ", ".join(f.base_model_type for f in FAMILIES)
    raise SwiftKVError(f"model_type {model_type!r} has no SwiftKV form; supported: {known}")


@dataclass(frozen=True)
class Split:
    """Which layers do what.

    Layers ``0 .. cut-1`` are the head. The later ones are the tail: their keys and values come from the head's
    output, and each run of ``group`` of them shares those of its first layer, the leader (AcrossKV).
    """

    layers: int
    cut: int
    group: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.cut < self.layers:
            raise SwiftKVError(
                f"num_key_value_layers must lie between 1 and {self.layers - 1} (the model has {self.layers} "
                f"layers), not {self.cut}"
            )
        if self.group < 1 or self.tail % self.group:
            raise SwiftKVError(
                f"key_value_group_size {self.group} does not divide the {self.tail} layers after layer {self.cut}"
            )

    @classmethod
    def of(cls, config: Any) -> Split:
        """From a SwiftKV config: ``num_hidden_layers``, ``num_key_value_layers``, ``key_value_group_size``."""
        cut = getattr(config, "num_key_value_layers", None)
        if not isinstance(cut, int):
            raise SwiftKVError("config.json has no num_key_value_layers: this is no SwiftKV checkpoint")
        return cls(config.num_hidden_layers, cut, getattr(config, "key_value_group_size", None) or 1)

    @property
    def tail(self) -> int:
        """Number of layers after the cut."""
        return self.layers - self.cut

    @property
    def leaders(self) -> tuple[int, ...]:
        """Indices of the tail layers that own a KV cache."""
        return tuple(range(self.cut, self.layers, self.group))

    def leader_of(self, layer: int) -> int:
        """The tail layer whose keys and values tail layer ``layer`` uses."""
        return layer - (layer - self.cut) % self.group
