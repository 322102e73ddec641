"""vllm-suite: plugins for an unmodified vLLM, and the tools beside it.

Importing this package pulls in neither torch nor vLLM.
"""

__version__ = "0.1.0"
