"""Tiny random multimodal checkpoints, written from a seed with no network.

Every family is served by an unmodified vLLM. The weights are random but so scaled that the greedy answer depends
on the whole picture or clip: a wrong encoder output shows up as other tokens. The text itself is noise.

numpy, safetensors and tokenizers are imported inside the functions; torch and transformers are not needed.
"""

from vllm_suite.fleet.tiny_media.config import FAMILIES, Family, MediaConfig
from vllm_suite.fleet.tiny_media.write import make_tiny_media, write

__all__ = ["FAMILIES", "Family", "MediaConfig", "make_tiny_media", "write"]
