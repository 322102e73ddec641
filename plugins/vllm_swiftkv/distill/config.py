"""Everything a distillation can be told, for the YAML file, the command line and code alike. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_suite.plugin_config import from_file
from vllm_swiftkv.families import SwiftKVError

# What may differ between a run and the one that resumes it: nothing here changes a trained number.
FREE = frozenset({"output", "resume", "save_every", "keep", "log_every"})


class DistillConfig(BaseModel):
    """One run. Defaults are the published recipe (ArcticTraining, ``projects/swiftkv``) where it has a value."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path = Field(description="ordinary checkpoint, or a SwiftKV one that still has its teacher weights")
    output: Path = Field(description="folder of the result; checkpoints and the log go into its folder `training`")
    data: list[Path] = Field(min_length=1, description="JSONL files, or folders of saved Hugging Face datasets")
    cut: float | None = Field(
        None, gt=0, lt=1, description="share of layers that prompts skip: 0.5 skips the last half"
    )
    cut_layer: int | None = Field(None, ge=1, description="in place of cut: number of layers with their own K/V")
    group: int | None = Field(None, ge=1, description="skipped layers that share one KV cache (AcrossKV)")

    eval_data: list[Path] = Field([], description="held-out data; default: a share of the data, see eval_share")
    eval_share: float = Field(0.01, gt=0, lt=1, description="share of the documents held out where eval_data is empty")
    eval_rows: int = Field(64, ge=1, description="rows of held-out data to measure on, at most")
    chat_template: Path | None = Field(None, description="Jinja file to use in place of the tokenizer's own template")
    max_length: int = Field(8192, ge=2, description="tokens per row; longer texts are split, longer chats cut off")
    packing: bool = Field(True, description="several documents per row, each blind to the others")

    epochs: float = Field(1.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="number of steps, in place of epochs")
    micro_batch: int = Field(1, ge=1, description="rows per forward pass and process")
    accumulation: int = Field(1, ge=1, description="forward passes per step")
    lr: float = Field(2e-4, gt=0, description="peak learning rate of AdamW")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="of AdamW"
    )
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps with rising rate; then it falls to zero")
    clip: float = Field(1.0, gt=0, description="largest norm of a step's gradient")
    temperature: float = Field(2.0, gt=0, description="of the logit distillation")
    hidden_weight: float = Field(1.0, ge=0, description="weight of the loss on the input of the last layer")

    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="bf16: frozen weights and arithmetic; what trains stays float32. auto: bf16 on a GPU"
    )
    attention: str = Field("sdpa", description="attention of transformers: sdpa, eager, flash_attention_2, ...")
    recompute: bool = Field(False, description="recompute the tail's activations in the backward pass")
    loss_memory_mib: int = Field(512, ge=1, description="memory that the logits of the loss may take at one time")
    seed: int = Field(0, ge=0, description="of the order of the data and the choice of held-out documents")

    resume: bool = Field(False, description="go on from the newest checkpoint in the output folder")
    save_every: int = Field(500, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints to keep")
    log_every: int = Field(1, ge=1, description="steps between lines of the log")
    prepare_only: bool = Field(False, exclude=True, description="tokenise the data and stop")

    @model_validator(mode="after")
    def _one_cut(self) -> DistillConfig:
        if self.cut is not None and self.cut_layer is not None:
            raise ValueError("cut and cut_layer are two ways to say the same; give one")
        return self

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the one it resumes, as JSON types."""
        return self.model_dump(mode="json", exclude=set(FREE))


def read(file: Path | None, flags: dict[str, Any]) -> DistillConfig:
    """The configuration of a YAML file and of flags, which win. Raises SwiftKVError that names file and key."""
    return from_file(DistillConfig, file, flags, SwiftKVError)
