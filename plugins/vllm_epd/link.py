"""The control link between the scheduler's half of the connector and the workers' halves, on one host.

vLLM's own way back from the workers does not exist for encoder-only instances on the V1 runner, and carries no
statistics there. The link is an abstract Unix socket that keeps message borders; its name comes from the engine's
configuration, which both sides share. A worker sends what a step did before the step's output leaves it, so the
scheduler finds it when it processes that output.

Neither side ever waits for the other: what does not fit into the socket stays in an outbox.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
from collections.abc import Callable, Sequence

import msgspec

from vllm_epd.link_channel import Channel, connect, peer_uid, readable
from vllm_epd.messages import ToScheduler, ToWorker, scheduler_decoder, worker_decoder

logger = logging.getLogger("vllm.suite.epd")


def link_name(engine_id: str, dp_index: int, rank: int) -> str:
    """Abstract socket name of one worker; the leading zero byte is not part of it."""
    return f"vllm-suite-ec-{engine_id}-{dp_index}-{rank}"


class WorkerEnd:
    """A worker's end. Listens from its making; messages go to ``on_message`` in the link's own thread.

    Args:
        first: sent first to each scheduler that connects.
    """

    def __init__(self, name: str, on_message: Callable[[ToWorker], None], first: Sequence[ToScheduler] = ()) -> None:
        self._on_message = on_message
        self._first = tuple(first)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind("\0" + name)
        self._listener.listen(1)
        self._channel: Channel | None = None
        self._early: list[ToScheduler] = []
        self._lock = threading.Lock()
        self._closing_read, self._closing_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="suite-ec-link", daemon=True)
        self._thread.start()

    def send(self, messages: Sequence[ToScheduler]) -> None:
        """Send without waiting; what does not fit goes as soon as there is room."""
        if not messages:
            return
        with self._lock:
            channel = self._channel
            if channel is None:
                self._early.extend(messages)
                return
            if not channel.send(messages):
                os.write(self._closing_write, b"f")  # the thread watches for room from now on

    def close(self) -> None:
        """End the thread; the socket's name is free afterwards."""
        with contextlib.suppress(OSError):
            os.write(self._closing_write, b"q")
        self._thread.join(2.0)

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._closing_read, select.POLLIN)
        poller.register(self._listener, select.POLLIN)
        try:
            while self._turn(poller):
                pass
        finally:
            self._listener.close()
            if self._channel is not None:
                self._channel.close()

    def _turn(self, poller: select.poll) -> bool:
        for fd, _event in poller.poll():
            if fd == self._closing_read:
                if b"q" in os.read(fd, 64):
                    return False
                if self._channel is not None:
                    poller.modify(self._channel.sock, select.POLLIN | select.POLLOUT)
            elif fd == self._listener.fileno():
                self._accept(poller)
            elif self._channel is not None:
                self._serve(poller, self._channel)
        return True

    def _accept(self, poller: select.poll) -> None:
        sock, _ = self._listener.accept()
        if peer_uid(sock) != os.getuid():
            logger.error("epd: refused a control link from another user")
            sock.close()
            return
        with self._lock:
            if self._channel is not None:
                poller.unregister(self._channel.sock)
                self._channel.close()
            self._channel = Channel(sock)
            early, self._early = self._early, []
            self._channel.send([*self._first, *early])
        poller.register(sock, select.POLLIN)

    def _serve(self, poller: select.poll, channel: Channel) -> None:
        if channel.flush() and channel.open:
            poller.modify(channel.sock, select.POLLIN)
        for packet in channel.receive():
            try:
                for message in worker_decoder.decode(packet):
                    self._on_message(message)
            except (msgspec.MsgspecError, RuntimeError):
                logger.exception("epd: an order over the control link was not carried out")
        if not channel.open:
            with self._lock:
                poller.unregister(channel.sock)
                channel.close()
                self._channel = None


class SchedulerEnd:
    """The scheduler's end of the links to all its workers.

    Args:
        names: socket name of each worker, in the order of ranks.

    Raises:
        ConfigError: a worker does not listen on this host.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._channels = [connect(name) for name in names]
        self._inbox: list[tuple[int, ToScheduler]] = []
        self._lock = threading.Lock()
        self._wake: Callable[[], None] = lambda: None
        self._read = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="suite-ec-link", daemon=True)
        self._thread.start()

    @property
    def ranks(self) -> frozenset[int]:
        return frozenset(range(len(self._channels)))

    @property
    def broken(self) -> bool:
        """A worker's end is closed: that worker is going down, and the engine with it."""
        return any(not channel.open for channel in self._channels)

    def set_wake(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def send(self, *messages: ToWorker) -> None:
        """To every worker, without waiting."""
        for channel in self._channels:
            channel.send(messages)

    def receive(self) -> list[tuple[int, ToScheduler]]:
        """Everything that has arrived, with the rank that sent it."""
        with self._lock:
            for rank, channel in enumerate(self._channels):
                channel.flush()
                for packet in channel.receive():
                    try:
                        self._inbox.extend((rank, message) for message in scheduler_decoder.decode(packet))
                    except msgspec.MsgspecError:
                        logger.exception("epd: rank %d sent no message of ours over the control link", rank)
            inbox, self._inbox = self._inbox, []
        self._read.set()
        return inbox

    def arrived(self) -> bool:
        """Whether `receive` would return something."""
        return any(channel.open and readable(channel.sock) for channel in self._channels)

    def close(self) -> None:
        self._closed = True
        self._read.set()
        for channel in self._channels:
            with contextlib.suppress(OSError):
                channel.sock.shutdown(socket.SHUT_RDWR)  # ends the watcher's poll
        self._thread.join(2.0)
        for channel in self._channels:
            channel.close()

    def _watch(self) -> None:
        """Wake the engine when a worker has said something; reading it is left to the engine's thread."""
        poller = select.poll()
        for channel in self._channels:
            poller.register(channel.sock, select.POLLIN)
        while not self._closed:
            self._read.clear()
            ready = poller.poll(1000)
            for fd, event in ready:
                if event & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                    poller.unregister(fd)
            if ready and not self._closed:
                self._wake()
                # The socket stays readable until the engine's thread has read it.
                self._read.wait(1.0)
