"""`python -m vllm_suite.fleet.tiny_media --family qwen2_5_vl OUT`: write a tiny multimodal checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_suite.fleet.tiny_media import FAMILIES, MediaConfig, make_tiny_media


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vllm_suite.fleet.tiny_media", description=__doc__)
    parser.add_argument("--family", required=True, choices=FAMILIES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vision-layers", type=int, default=MediaConfig.vision_layers, help="of the encoder")
    parser.add_argument("--vision-hidden", type=int, default=MediaConfig.vision_hidden, help="of the encoder")
    parser.add_argument("--text-layers", type=int, default=MediaConfig.text_layers)
    parser.add_argument("--text-hidden", type=int, default=MediaConfig.text_hidden)
    parser.add_argument("out", type=Path, help="directory to write")
    args = vars(parser.parse_args(argv))
    out: Path = args.pop("out")
    try:
        config = MediaConfig(**args)
    except ValueError as error:
        parser.error(str(error))
    make_tiny_media(out, config)
    megabytes = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    print(f"{out}: {config.family}, {megabytes:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
