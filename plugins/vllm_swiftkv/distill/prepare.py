"""What a run of distillation needs before its first step: processes, data, the model; and what may be wrong."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs

from vllm_swiftkv.convert.plan import choose_split
from vllm_swiftkv.distill import rows, state, store
from vllm_swiftkv.distill.config import DistillConfig
from vllm_swiftkv.families import SwiftKVError, of_model_type
from vllm_swiftkv.hf import checkpoint

_DATA_DEADLINE = timedelta(hours=4)  # the other processes wait while the first tokenises


@dataclass(frozen=True)
class Data:
    """What to train on and what to measure on."""

    train: store.Store
    train_rows: list[rows.Row]
    held: store.Store
    held_rows: list[rows.Row]


def accelerator(config: DistillConfig) -> Accelerator:
    """The processes of this run. Raises SwiftKVError for a way of sharing that is not supported."""
    cpu = not torch.cuda.is_available()
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    precision = {"fp32": "no", "bf16": "bf16"}.get(config.precision, None if launched else "no" if cpu else "bf16")
    wait = InitProcessGroupKwargs(timeout=_DATA_DEADLINE)
    made = Accelerator(mixed_precision=precision, cpu=cpu, kwargs_handlers=[wait])
    if made.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise SwiftKVError("sharding is FSDP's here: configure accelerate with FSDP (version 2) in place of DeepSpeed")
    if made.distributed_type == DistributedType.FSDP and not made.is_fsdp2:
        raise SwiftKVError("frozen and trained weights need FSDP version 2: accelerate launch --fsdp_version 2")
    if made.mixed_precision not in ("no", "bf16"):
        raise SwiftKVError(f"mixed precision {made.mixed_precision} is not supported: use no or bf16")
    return made


def check_output(config: DistillConfig, work: Path) -> None:
    """Make the working folder. Raises SwiftKVError where something of another run would be lost."""
    if (config.output / "config.json").is_file():
        raise SwiftKVError(f"{config.output} holds a finished checkpoint: give another output")
    strange = [p.name for p in config.output.iterdir() if p != work] if config.output.is_dir() else []
    if strange and not work.is_dir():
        raise SwiftKVError(f"{config.output} holds other files ({', '.join(sorted(strange)[:3])}): give a new folder")
    if state.checkpoints(work) and not config.resume:
        raise SwiftKVError(f"{work} has checkpoints of a run before: add --resume, or give another output")
    work.mkdir(parents=True, exist_ok=True)


def data(config: DistillConfig, processes: Accelerator, work: Path) -> Data:
    """Tokenised by the first process, packed into rows by each. Raises SwiftKVError."""
    with checkpoint.quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model, model_max_length=int(1e12))
    if not tokenizer.is_fast:
        raise SwiftKVError(f"{config.model} has no tokenizer.json: what to learn is found by its character offsets")
    if config.chat_template is not None:
        try:
            tokenizer.chat_template = config.chat_template.read_text()
        except OSError as error:
            raise SwiftKVError(f"{config.chat_template} cannot be read: {error}") from error
    with processes.main_process_first():
        train, *held = [
            store.open_store(store.prepare(list(paths), tokenizer, config.max_length, work))
            for paths in (config.data, config.eval_data)
            if paths
        ]
    documents = train.numbers()
    if held:
        held_documents = held[0].numbers()
    else:
        if len(train) < 2:
            raise SwiftKVError("one document cannot be trained on and held out: give more, or --eval-data")
        documents, held_documents = rows.split_held_out(len(train), config.eval_share, config.seed)
    other = held[0] if held else train
    return Data(
        train,
        rows.pack(train.lengths(), documents, config.max_length, config.packing),
        other,
        rows.pack(other.lengths(), held_documents, config.max_length, config.packing),
    )


def cut(config: DistillConfig) -> int | None:
    """Number of layers before the cut; None where the checkpoint is a SwiftKV one and says it itself."""
    raw = checkpoint.read_config(config.model)
    family = of_model_type(str(raw.get("model_type")))
    ordinary = raw["model_type"] == family.base_model_type
    if config.cut is None and config.cut_layer is None:
        if ordinary:
            raise SwiftKVError(
                f"{config.model} is an ordinary checkpoint: say where to cut it, by --cut or --cut-layer"
            )
        return None
    group = config.group or (1 if ordinary else int(raw.get("key_value_group_size") or 1))
    return choose_split(int(raw["num_hidden_layers"]), config.cut, config.cut_layer, group).cut


def model(config: DistillConfig, processes: Accelerator, before: int | None) -> Any:
    """The student, with its teacher in it; cut where ``before`` says, unless the checkpoint is cut already."""
    dtype = torch.bfloat16 if processes.mixed_precision == "bf16" else torch.float32
    made = checkpoint.load(config.model, cut=before, group=config.group, dtype=dtype, attention=config.attention)
    if config.recompute:
        made.gradient_checkpointing_enable({"use_reentrant": False})
    return made
