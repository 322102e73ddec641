"""One family's encoder in a process of its own, without an engine: `check FAMILY FOLDER` prints what differed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from internvl_chat import write_internvl_chat

from vllm_suite.compat.slices import RULES, cut
from vllm_suite.encoded import Slice
from vllm_suite.fleet.tiny_media import write

FILMS = ((6, 8, 8), (5, 4, 12), (4, 16, 10))  # temporal patches, rows and columns of patches
TILES = 7


def items(architecture: str, row: int) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """Processed items of every modality that is cut: random pixels, as no picture has them."""
    draw = torch.Generator().manual_seed(1)
    found: list[tuple[str, dict[str, torch.Tensor]]] = []
    for modality, rule in RULES[architecture].items():
        if rule.grid:
            for t, h, w in FILMS:
                pixels = torch.randn(t * h * w, row, generator=draw)
                found.append((modality, {rule.pixels: pixels, rule.size: torch.tensor([t, h, w])}))
        else:
            pixels = torch.randn(TILES, 3, 112, 112, generator=draw)
            found.append((modality, {rule.pixels: pixels, rule.size: torch.tensor(TILES)}))
    return found


def feature(modality: str, fields: dict[str, torch.Tensor]) -> Any:
    from vllm.multimodal.inputs import (
        MultiModalBatchedField,
        MultiModalFeatureSpec,
        MultiModalFieldElem,
        MultiModalKwargsItem,
        PlaceholderRange,
    )

    elements = {key: MultiModalFieldElem(data=value, field=MultiModalBatchedField()) for key, value in fields.items()}
    return MultiModalFeatureSpec(MultiModalKwargsItem(elements), modality, "i", PlaceholderRange(0, 1))


def encoder(folder: Path, family: str) -> tuple[str, Any, Callable[[Any], torch.Tensor]]:
    """The model's class, the model, and its encoder over one feature."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.model_loader import get_model

    chat = family == "internvl_chat"
    path = write_internvl_chat(folder) if chat else write(family, folder)  # type: ignore[arg-type]
    args = EngineArgs(model=str(path), dtype="float32", enforce_eager=True, trust_remote_code=chat, max_model_len=1024)
    config = args.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        model = get_model(vllm_config=config)

    def encode(one: Any) -> torch.Tensor:
        fields = {key: elem.data for key, elem in one.data.items()}
        size = RULES[config.model_config.architecture][one.modality].size
        fields[size] = fields[size][None]  # a batch of one item
        more = {"image_token_id": torch.tensor([3]), "video_token_id": torch.tensor([3])}
        with torch.inference_mode(), set_forward_context(None, config), set_current_vllm_config(config):
            rows: torch.Tensor = model.embed_multimodal(**fields, **more)[0]
        return rows

    return config.model_config.architecture, model, encode


def check(family: str, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.accelerator.empty_cache = lambda: None  # what vLLM's own CPU worker does
    architecture, model, encode = encoder(folder, family)
    row = model.visual.patch_embed.proj.weight[0].numel() if hasattr(model, "visual") else 0
    for modality, fields in items(architecture, row):
        whole = feature(modality, fields)
        rows, rule = encode(whole), RULES[architecture][modality]
        for count in (2, 3):
            parts = [encode(cut(whole, rule, Slice("i", index, count))) for index in range(count)]
            assert torch.equal(torch.cat(parts), rows), (modality, count)
            assert not torch.equal(torch.cat(parts[::-1]), rows), "the rows do not depend on the pixels"
            print("equal", modality, count, len(rows))


if __name__ == "__main__":
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    check(sys.argv[1], Path(sys.argv[2]))
