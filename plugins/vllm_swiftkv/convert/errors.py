"""What a conversion can end with."""

from __future__ import annotations

from vllm_swiftkv.families import SwiftKVError


class ConvertError(SwiftKVError):
    """The conversion cannot be done as asked. The text is one line for the person who asked; nothing was lost."""
