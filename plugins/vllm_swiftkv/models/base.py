"""The mix-in that turns one of vLLM's decoder-only families into its SwiftKV form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from vllm_suite.compat.models import (
    AutoWeightsLoader,
    LogitsProcessor,
    ParallelLMHead,
    SupportsLoRA,
    SupportsQuant,
    VllmConfig,
)
from vllm_swiftkv.families import Family
from vllm_swiftkv.models import guards
from vllm_swiftkv.models.body import SwiftKVModel
from vllm_swiftkv.models.loading import MAPPER, lora_names, no_bias_lost, place, require
from vllm_swiftkv.settings import SwiftKVSettings


class SwiftKVForCausalLM(nn.Module, SupportsLoRA, SupportsQuant):
    """A SwiftKV causal language model.

    A family gives `family`, `make_layer` and `make_mlp`. The skip is armed by ``--kv-sharing-fast-prefill``; without
    it the same weights compute every row of every layer.
    """

    family: ClassVar[Family]
    hf_to_vllm_mapper = MAPPER
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
        "kv_proj_swiftkv": ["k_proj_swiftkv", "v_proj_swiftkv"],
    }
    embedding_modules: ClassVar[dict[str, str]] = {
        "embed_tokens": "input_embeddings",
        "lm_head": "output_embeddings",
    }

    @staticmethod
    def make_layer(vllm_config: VllmConfig, prefix: str) -> nn.Module:
        """One of the family's ordinary decoder layers."""
        raise NotImplementedError

    @staticmethod
    def make_mlp(vllm_config: VllmConfig, prefix: str) -> nn.Module:
        """The MLP of one of the family's decoder layers."""
        raise NotImplementedError

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        armed = bool(vllm_config.cache_config.kv_sharing_fast_prefill)
        settings = SwiftKVSettings.of(vllm_config)
        self.prefill_only = settings.prefill_only
        guards.check(vllm_config, self.family, armed, self.prefill_only)
        prefix = f"{prefix}." if prefix else ""
        self.model = SwiftKVModel(
            vllm_config=vllm_config,
            prefix=f"{prefix}model",
            family=self.family,
            make_layer=self.make_layer,
            make_mlp=self.make_mlp,
            armed=armed,
            settings=settings,
        )
        self.hf_to_vllm_mapper = MAPPER | lora_names(self.model.split, armed)
        # Later calls may bring new weights piece by piece, as trainers do.
        self._expects_all = vllm_config.load_config.load_format != "dummy"
        if self.prefill_only:
            return
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config, prefix=f"{prefix}lm_head"
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size, scale=getattr(config, "logit_scale", 1.0))

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[tokens] -> [tokens, hidden]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [tokens, hidden]; see `SwiftKVModel.forward` for rows that skipped the tail."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[rows, hidden] -> [rows, vocabulary].

        All equal on a prefill-only instance, which has no LM head: its one token means nothing and the decode
        instance does not read it.
        """
        if self.prefill_only:
            return hidden_states.new_zeros(hidden_states.shape[0], self.config.vocab_size)
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a SwiftKV checkpoint; returns the names of the parameters that were set.

        Raises SwiftKVError where the first call does not bring every tensor, or one that contradicts the config.
        """
        given: set[str] = set()

        def noted() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                given.add(name)
                yield name, tensor

        placed = place(noted(), self.model.split, self.family.qk_norm, self.prefill_only, self.model.late_kv.rows)
        parameters = {name for name, _ in nn.Module.named_parameters(self)}
        kept = no_bias_lost(placed, parameters)
        loaded: set[str] = AutoWeightsLoader(self).load_weights(kept, mapper=MAPPER)
        if self._expects_all:
            require(parameters, loaded, given, self.model.split)
            self._expects_all = False
        return loaded
