"""SwiftKV on top of transformers' own model classes: one copy of the weights, two ways through it.

The teacher's way is the ordinary model, run by transformers. The student's way (arXiv 2410.03960, section 3) runs the
head as it is, and the tail with keys and values made from the head's output.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutput

from vllm_swiftkv import configs
from vllm_swiftkv.families import FAMILIES, Family, Split, SwiftKVError
from vllm_swiftkv.hf.layers import KeyValue, start_from_teacher, tail_layer_class


def register() -> None:
    """Make ``AutoConfig`` and ``AutoModelForCausalLM`` know every SwiftKV family. May be called again."""
    from transformers import conversion_mapping

    configs.register()
    for family in FAMILIES:
        model = model_class(family)
        transformers.AutoModelForCausalLM.register(configs.config_class(family), model, exist_ok=True)
        # How transformers folds the experts of a checkpoint into one tensor, and unfolds them when it saves.
        mapping = conversion_mapping.get_checkpoint_conversion_mapping(family.base_model_type)
        if mapping is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(family.model_type, mapping, overwrite=True)


@functools.cache
def model_class(family: Family) -> type[Any]:
    """``LlamaSwiftKVForCausalLM`` and the like: transformers' class with the student's way beside its own."""
    base = getattr(transformers, family.base_architecture)
    fields = {
        "__module__": __name__,
        "config_class": configs.config_class(family),
        "config": None,
        "family": family,
        "_no_split_modules": [*base._no_split_modules, *(tail_layer_class(c).__name__ for c in _layer_classes(base))],
    }
    return type(family.architecture, (_SwiftKV, base), fields)


def _layer_classes(base: Any) -> list[Any]:
    import importlib

    module = importlib.import_module(base.__module__)
    return [getattr(module, name) for name in base._no_split_modules]


@dataclass(frozen=True)
class TailStates:
    """What a way through the tail gives.

    Attributes:
        penultimate: [B, T, D], the input of the last layer: ``hidden_states[-2]`` of a transformers model.
        last: [B, T, D] after the final norm, what the LM head takes.
    """

    penultimate: Tensor
    last: Tensor


@dataclass(frozen=True)
class HeadStates:
    """The head's output, [B, T, D], and what every layer is called with."""

    hidden: Tensor
    call: dict[str, Any]


class _SwiftKV:
    """Goes before a transformers ``...ForCausalLM`` among the bases."""

    family: Family

    def __init__(self, config: Any, *, teacher: bool = True) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        me: Any = self
        self.split = Split.of(config)
        self.teacher = teacher
        if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()) or (
            getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None) is not None
        ):
            raise SwiftKVError(
                "sliding-window attention has no SwiftKV form here: a tail layer attends over the whole context. "
                "Set sliding_window to null in config.json if the model works without it"
            )
        layers = me.model.layers
        for i in range(self.split.cut, self.split.layers):
            kind: Any = type(layers[i])
            layers[i] = tail_layer_class(kind)(
                config,
                i,
                leader=i in self.split.leaders,
                bias=self.family.has_qkv_bias(config),
                teacher=teacher,
            )
        me.model.norm_swiftkv = type(me.model.norm)(config.hidden_size, eps=config.rms_norm_eps)
        me.post_init()

    def student_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that distillation trains, by name: the late q/k/v with their biases, and the late norm."""
        return {name: p for name, p in self.named_parameters() if "_swiftkv" in name}  # type: ignore[attr-defined]

    def start_from_teacher(self) -> None:
        """Set the student's own weights from the teacher's (reference section 3): the state before any training."""
        model: Any = self.model  # type: ignore[attr-defined]
        if not self.teacher:
            raise SwiftKVError("the student cannot start from teacher weights that the checkpoint does not have")
        start_from_teacher(list(model.layers), self.split.cut, self.split.group)
        model.norm_swiftkv.weight.detach().copy_(model.layers[self.split.cut].input_layernorm.weight.detach())

    def head(self, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Any = None) -> HeadStates:
        """Run the layers before the cut, which teacher and student share.

        Args:
            input_ids: [B, T].
            position_ids: [B, T]; several sequences in one row are told apart by positions that start again.
            attention_mask: [B, T], 0 at padding, as transformers takes it.
        """
        model: Any = self.model  # type: ignore[attr-defined]
        x = model.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        mask = create_causal_mask(
            config=model.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=position_ids,
        )
        call = {
            "attention_mask": mask,
            "position_ids": position_ids,
            "position_embeddings": model.rotary_emb(x, position_ids=position_ids),
        }
        for layer in model.layers[: self.split.cut]:
            x = layer(x, **call)
        return HeadStates(x, call)

    def tail(self, head: HeadStates, *, swiftkv: bool) -> TailStates:
        """Run the layers after the cut: the student's way, or with ``swiftkv=False`` the teacher's."""
        model: Any = self.model  # type: ignore[attr-defined]
        x = head.hidden
        late_input = model.norm_swiftkv(x) if swiftkv else None
        late_kv: KeyValue | None = None
        for i in range(self.split.cut, self.split.layers):
            penultimate = x
            if not swiftkv:
                x = model.layers[i](x, **head.call)
            elif i in self.split.leaders:
                x, late_kv = model.layers[i](x, late_input=late_input, **head.call)
            else:
                x, _ = model.layers[i](x, late_kv=late_kv, **head.call)
        return TailStates(penultimate, model.norm(x))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        swiftkv: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Logits, [B, T, V], in a ``CausalLMOutput``; of the ordinary model with ``swiftkv=False``.

        Raises SwiftKVError for a KV cache on the student's way (pass ``use_cache=False``), and for the teacher's way
        through a checkpoint without teacher weights.
        """
        if not swiftkv:
            kwargs.setdefault("use_cache", False)
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
            )
        if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
            raise SwiftKVError("the student runs without a KV cache here: pass use_cache=False, or serve it with vLLM")
        states = self.tail(self.head(input_ids, position_ids, attention_mask), swiftkv=True)
        return CausalLMOutput(logits=self.lm_head(states.last))  # type: ignore[attr-defined]

    def generate_greedy(self, prompt: list[int], n: int, *, swiftkv: bool = True) -> list[int]:
        """The ``n`` most likely tokens after ``prompt``, one whole forward pass each; no token ends them early."""
        out = list(prompt)
        for _ in range(n):
            ids = torch.tensor([out], device=self.device)  # type: ignore[attr-defined]
            with torch.no_grad():
                out.append(int(self.forward(ids, swiftkv=swiftkv).logits[0, -1].argmax()))
        return out[len(prompt) :]
