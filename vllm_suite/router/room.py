"""Room for the bodies of requests: what all of them together may take of the router's memory."""

from __future__ import annotations


class NoRoom(Exception):
    """The bodies that are held leave no room for this one."""


class Room:
    """Bytes of all bodies that one router holds, `limit` at most."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def fits(self, size: int) -> bool:
        """Whether so many bytes could come in now."""
        return self.held + size <= self.limit


class Share:
    """What one request has of the room. A body takes its share as it comes in: an announced length takes none, so
    that clients that send nothing keep nobody out.
    """

    __slots__ = ("_held", "_room")

    def __init__(self, room: Room) -> None:
        self._room = room
        self._held = 0

    def take(self, size: int) -> None:
        """So many bytes more have come in. Raises `NoRoom`."""
        if not self._room.fits(size):
            raise NoRoom
        self._held += size
        self._room.held += size

    def release(self) -> None:
        """Nothing of the body is held any more; no harm where that was said before."""
        self._room.held -= self._held
        self._held = 0
