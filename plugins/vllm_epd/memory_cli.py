"""`vllm-suite epd memory`: what each kind of instance holds, and the paper's tables beside ours."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_epd.memory_model import BYTES, KINDS, Gpu, Model, fits_window, from_config
from vllm_epd.memory_paper import ASSUMPTIONS, RESOLUTIONS, SOURCE, Cell, cells, models
from vllm_suite.media.config import UnknownModel

if TYPE_CHECKING:
    from rich.console import Console

_GIB = 2**30
_LABELS = {"monolithic": "monolithic", "encode": "encoder only", "prefill": "prefill, no encoder"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--model", type=Path, metavar="PATH", help="a checkpoint, or its config.json (default: the paper's models)"
    )
    parser.add_argument(
        "--resolution", type=_resolution, action="append", metavar="WxH", help="of an image; may be given again"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(BYTES))
    parser.add_argument("--gpu-gib", type=float, default=80.0, metavar="G", help="memory of the GPU (80)")
    parser.add_argument("--usable", type=float, default=0.9, metavar="SHARE", help="of it that the engine takes (0.9)")
    parser.add_argument("--kv-share", type=float, default=0.8, metavar="SHARE", help="of what is free (0.8)")
    parser.add_argument(
        "--cache-tiles", type=int, default=3000, metavar="N", help="tiles that the token cache holds (3000)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")


def run(args: argparse.Namespace) -> int:
    """Print the tables; 2 where the model is of no known family or cannot be read."""
    from rich.console import Console

    from vllm_suite.provenance import provenance

    if not (args.gpu_gib > 0 and 0 < args.usable <= 1 and 0 <= args.kv_share < 1 and args.cache_tiles >= 0):
        sys.stderr.write("vllm-suite epd memory: error: shares are between 0 and 1, sizes not negative\n")
        return 2
    gpu = Gpu(int(args.gpu_gib * _GIB), args.usable, args.kv_share, args.cache_tiles, BYTES[args.dtype])
    try:
        chosen = [_read(args.model)] if args.model else list(models().values())
    except (OSError, ValueError) as error:
        what = error if isinstance(error, UnknownModel | OSError) else f"{args.model}: {error}"
        sys.stderr.write(f"vllm-suite epd memory: error: {what}\n")
        return 2
    resolutions = tuple(args.resolution or RESOLUTIONS)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    result: dict[str, Any] = {"dtype": args.dtype, "gpu_bytes": gpu.bytes, "models": []}
    for model in chosen:
        numbers = sizes(model, gpu, resolutions)
        result["models"].append(numbers)
        _show(console, numbers, args.dtype)
    if args.model is None:
        compared = sorted(cells(), key=lambda cell: (cell.table, cell.model))
        result["paper"] = {"source": SOURCE, "assumptions": ASSUMPTIONS, **_summary(compared)}
        result["paper"]["cells"] = [{**dataclasses.asdict(c), "deviation": c.deviation} for c in compared]
        _show_paper(console, compared)
    if args.json:
        args.json.write_text(json.dumps(result | provenance(), indent=1) + "\n")
    return 0


def sizes(model: Model, gpu: Gpu, resolutions: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The numbers of one model as JSON types."""
    whole = model.parameters("monolithic")
    instances = {
        kind: {
            "parameters": model.parameters(kind),
            "weight_bytes": model.parameters(kind) * gpu.value,
            "weights_saved": 1 - model.parameters(kind) / whole,
            "kv_bytes_per_token": 0 if kind == "encode" else model.language.kv_values * gpu.value,
            "free_bytes": int(gpu.free(model, kind)),
            "kv_cache_bytes": 0 if kind == "encode" else max(0, int(gpu.free(model, kind) * gpu.kv_share)),
        }
        for kind in KINDS
    }
    images = []
    for width, height in resolutions:
        cost, at = model.image(width, height), (width, height)
        images.append(
            {
                "resolution": [width, height],
                "tiles": cost.tiles,
                "patches_per_tile": cost.patches,
                "encoder_tokens": cost.tokens,
                "prompt_tokens": cost.prompt_tokens,
                "output_bytes": model.image_bytes(width, height, gpu.value),
                "kv_bytes": cost.prompt_tokens * model.language.kv_values * gpu.value,
                "most_by_window": fits_window(model, at),
                "most_by_memory": {kind: gpu.images(model, kind, at) for kind in KINDS},
            }
        )
    return {"name": model.name, "window": model.language.window, "instances": instances, "images": images}


def _show(console: Console, numbers: dict[str, Any], dtype: str) -> None:
    from rich.table import Table

    table = Table(
        "instance", "parameters", "weights, GB", "saved", "KV bytes per token", "free, GB", "KV cache, GB",
        title=f"{numbers['name']}, {dtype}", title_justify="left",
    )  # fmt: skip
    for kind, row in numbers["instances"].items():
        table.add_row(
            _LABELS[kind],
            f"{row['parameters']:,}",
            f"{row['weight_bytes'] / 1e9:.2f}",
            f"{row['weights_saved']:.1%}",
            f"{row['kv_bytes_per_token']:,}" if kind != "encode" else "none",
            f"{row['free_bytes'] / 1e9:.1f}",
            f"{row['kv_cache_bytes'] / 1e9:.1f}" if kind != "encode" else "none",
        )
    console.print(table)
    columns = ("image", "tiles", "encoder tokens", "E to P, MB", "KV, MB", "window", "monolithic", "encoder", "prefill")
    title = "one image, and most images per request by window and by memory"
    table = Table(*columns, title=title, title_justify="left")
    for image in numbers["images"]:
        row = [
            f"{image['resolution'][0]}x{image['resolution'][1]}",
            str(image["tiles"]),
            str(image["encoder_tokens"]),
        ]
        row += [f"{image[key] / 1e6:.2f}" for key in ("output_bytes", "kv_bytes")]
        table.add_row(*row, str(image["most_by_window"]), *(str(n) for n in image["most_by_memory"].values()))
    console.print(table)


def _show_paper(console: Console, compared: Sequence[Cell]) -> None:
    from rich.table import Table

    table = Table("table", "model", "what", "at", "paper", "computed", "deviation", title=f"beside {SOURCE}",
                  title_justify="left")  # fmt: skip
    for cell in compared:
        table.add_row(cell.table, cell.model, cell.what, cell.at, str(cell.paper), str(cell.ours), _deviation(cell))
    console.print(table)
    console.print("Assumptions:")
    for line in ASSUMPTIONS:
        console.print(f"  {line}", markup=False)
    found = _summary(compared)
    console.print(f"{found['figures']} figures: {found['equal']} equal, {found['within_10_percent']} within 10 %")


def _summary(compared: Sequence[Cell]) -> dict[str, int]:
    equal, near = (sum(cell.within(tolerance) for cell in compared) for tolerance in (0.0, 0.1))
    return {"figures": len(compared), "equal": equal, "within_10_percent": near}


def _deviation(cell: Cell) -> str:
    if cell.deviation is None:
        return "" if cell.paper == cell.ours else "differs"
    return f"{cell.deviation:+.1f} points" if cell.in_points else f"{cell.deviation:+.0%}"


def _read(path: Path) -> Model:
    path = path / "config.json" if path.is_dir() else path
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise UnknownModel(f"{path}: an object is expected")
    return from_config(config, str(config.get("_name_or_path") or path.parent.name), _pixels(path.parent))


def _pixels(folder: Path) -> tuple[int, int] | None:
    """The processor's own limits, where its file is beside the config."""
    try:
        found = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    size = found.get("size") or {}
    least = found.get("min_pixels") or size.get("shortest_edge")
    most = found.get("max_pixels") or size.get("longest_edge")
    return (int(least), int(most)) if least and most else None


def _resolution(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"a resolution is written as 640x480, not {text!r}")
    return int(width), int(height)
