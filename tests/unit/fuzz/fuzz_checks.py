"""What every fuzz test asks: the log is clean, errors have words, and how many examples are drawn."""

from __future__ import annotations

import gc
import json
import logging
from typing import Any

from hypothesis import HealthCheck, Phase, settings

DEADLINE_S = 20.0
"""Of one exchange. All of the router's own deadlines together are far shorter."""

OWN = {400, 401, 404, 405, 408, 411, 413, 417, 429, 431}
"""What the router, or the HTTP server under it, says of a request."""

_SUPPRESSED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def examples(count: int) -> Any:
    """So many. Where they are few they are the same ones each time, and one that fails is not made smaller."""
    few = count < 1000
    phases = [Phase.explicit, Phase.generate] if few else [phase for phase in Phase if phase is not Phase.explain]
    return settings(
        max_examples=count, deadline=None, suppress_health_check=_SUPPRESSED, derandomize=few, phases=phases
    )


class Log(logging.Handler):
    """What libraries and router report with an exception, or as an error."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.levelno >= logging.ERROR:
            text = logging.Formatter().format(record)
            self.found.append(f"{record.name}: {text[-2000:]}")


def complaints(log: Log) -> list[str]:
    """What was logged, tasks whose exception nobody looked at included; forgets it."""
    gc.collect()
    found, log.found = log.found, []
    return found


def says_why(body: bytes) -> bool:
    """An error body in vLLM's shape, or in the words of the HTTP server."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, LookupError, TypeError):
        return bool(body.strip())
    return bool(error if isinstance(error, str) else error["message"])
