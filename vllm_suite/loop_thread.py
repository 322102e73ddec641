"""An event loop in a thread of its own, and the listening sockets that plugins serve from it."""

from __future__ import annotations

import asyncio
import socket
import threading


class LoopThread:
    """An asyncio event loop in a daemon thread, with a start and a stop that have deadlines."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def stop(self, timeout_s: float = 2.0) -> None:
        """Cancel what runs in the loop and end the thread."""
        if not self._thread.is_alive():
            return
        self.loop.call_soon_threadsafe(self._cancel_all)
        self._thread.join(timeout_s)

    def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.call_later(0.05 if tasks else 0, self.loop.stop)


def bind(host: str, port: int, what: str) -> socket.socket:
    """A listening TCP socket.

    Raises:
        OSError: the address is taken or not ours; the message says which setting to change.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.listen(128)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise OSError(error.errno, f"{what} {host}:{port} cannot be opened: {error.strerror or error}") from error
    return sock
