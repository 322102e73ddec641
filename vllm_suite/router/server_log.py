"""Bytes from outside that are no HTTP: counted, and kept from filling the log with tracebacks."""

from __future__ import annotations

import logging

from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web import RequestPayloadError

from vllm_suite.router.metrics import RouterMetrics

_SERVER_LOG = "aiohttp.server"


class BadHttp(logging.Filter):
    """aiohttp answers such bytes with 400 and its reason, and logs an error with a traceback for each; the same for a
    body that is not in the encoding it claims, after the router has answered.

    Anybody who reaches the port can send them, before any key is asked for. Everything else passes.
    """

    def __init__(self, metrics: RouterMetrics) -> None:
        super().__init__()
        self._metrics = metrics

    def filter(self, record: logging.LogRecord) -> bool:
        """False for a record of a client's bad bytes, which is counted."""
        error = record.exc_info[1] if record.exc_info else None
        bad_head = isinstance(error, HttpProcessingError) and 400 <= error.code < 500
        if bad_head or isinstance(error, RequestPayloadError):
            self._metrics.count("rejected", "bad_http")
            return False
        return True

    def install(self) -> None:
        """Begin; `remove` ends it."""
        logging.getLogger(_SERVER_LOG).addFilter(self)

    def remove(self) -> None:
        """The log is as it was."""
        logging.getLogger(_SERVER_LOG).removeFilter(self)
