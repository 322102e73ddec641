"""vLLM's two interfaces for logits processors, one per model runner."""

from __future__ import annotations

from vllm.v1.sample.logits_processor.interface import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

__all__ = ["LogitsProcessor", "LogitsProcessorV2"]
