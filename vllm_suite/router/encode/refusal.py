"""A media part that the router does not take, in words that name it."""

from __future__ import annotations


class MediaRefused(Exception):
    """The request is answered with `status` and this message.

    Attributes:
        status: 400, or 413 for what is too large, or 502/503 for what no instance could encode.
        reason: metric label, one of a closed set.
        param: where in the body, for example ``messages[0].content[2]``; None for the whole request.
    """

    def __init__(self, status: int, reason: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.param = param


class BadMedia(Exception):
    """What is wrong with one item's bytes or address; `Item.refused` adds which item it is."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
