"""TRL, imported without vLLM where a run does not sample with it: that import takes several seconds."""

from __future__ import annotations

import sys
import warnings

from vllm_dler.train.grading import TrainError

_SERIES = "1.16."


def prepare(vllm: bool) -> None:
    """Call it before anything imports ``trl``'s trainers.

    Raises TrainError for a TRL whose methods this suite has not been tried with. TRL names the vLLM versions that it
    was tried with and warns about others; vLLM 0.32 is one past its list.
    """
    import trl
    from trl import import_utils

    if not trl.__version__.startswith(_SERIES):
        raise TrainError(f"TRL {trl.__version__} is installed, {_SERIES}* is needed: pip install 'trl>=1.16,<1.17'")
    if not vllm and "trl.trainer.grpo_trainer" not in sys.modules:
        import_utils.is_vllm_available = lambda min_version=None: False
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")
