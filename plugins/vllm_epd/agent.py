"""NIXL as the encoder cache uses it: memory registered once, and reads of another agent's memory.

An agent's progress thread sleeps until traffic wakes it (see `vllm_suite.compat.nixl_progress`): the
producer of an item has nothing to poll while it is read, and an idle agent costs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch

from vllm_suite.compat.nixl_progress import quiet_agents

logger = logging.getLogger("vllm.suite.epd")

# Sleep of the progress thread where nothing wakes it, microseconds. Traffic does, whatever the value.
DEFAULT_PROGRESS_DELAY_US = 100_000

Piece = tuple[int, int]  # address, bytes
State = Literal["reading", "done", "failed"]


class TransferError(RuntimeError):
    """NIXL refused or failed an operation; the message has its own words."""


class Agent:
    """One NIXL agent of this process. Any thread may call; calls exclude each other.

    Args:
        name: unique among all agents of the fleet.
        progress_delay_us: see `DEFAULT_PROGRESS_DELAY_US`; 0 spins.

    Raises:
        TransferError: NIXL or its UCX back end cannot start.
    """

    def __init__(self, name: str, progress_delay_us: int | None = None) -> None:
        from nixl._api import nixl_agent, nixl_agent_config, nixl_thread_sync_t

        delay = DEFAULT_PROGRESS_DELAY_US if progress_delay_us is None else progress_delay_us
        self.name = name
        self._registered: list[Any] = []
        self._remotes: set[str] = set()
        config = nixl_agent_config(
            enable_prog_thread=True, backends=["UCX"], sync_mode=nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        )
        with quiet_agents(delay):
            self._nixl: Any = _checked(nixl_agent, name, config)

    def register(self, slab: torch.Tensor) -> None:
        """Make a contiguous tensor's memory readable by others, and a place that `read` may write to."""
        size = slab.numel() * slab.element_size()
        region = [(slab.data_ptr(), size, _device(slab), "")]
        self._registered.append(_checked(self._nixl.register_memory, region, memory_kind(slab)))

    def metadata(self) -> bytes:
        """What another agent needs to read from this one. Register memory first."""
        return bytes(_checked(self._nixl.get_agent_metadata))

    def add_remote(self, metadata: bytes) -> str:
        """Learn another agent. Returns its name, for `read` and `forget`.

        Raises:
            TransferError: not metadata, or of an agent that is known with other memory.
        """
        name = _checked(self._nixl.add_remote_agent, metadata)
        text = name.decode() if isinstance(name, bytes) else str(name)
        self._remotes.add(text)
        return text

    def read(
        self,
        remote: str,
        local: Sequence[Piece],
        pieces: Sequence[Piece],
        memory: str,
        *,
        device: int = 0,
        local_memory: str = "DRAM",
        local_device: int = 0,
    ) -> Read:
        """Begin to copy ``pieces`` of ``remote``'s memory into ``local``, in order; both have the same bytes in all.

        Args:
            memory, device: the remote memory's kind and device index; ``local_memory`` and ``local_device`` are this
                side's.

        Raises:
            TransferError: an address is outside what either side registered, or the remote is gone.
            ValueError: the two sides differ in size, or are empty.
        """
        here, there = _paired(local, pieces)
        nixl = self._nixl
        near = _checked(nixl.get_xfer_descs, [(at, size, local_device) for at, size in here], local_memory)
        far = _checked(nixl.get_xfer_descs, [(at, size, device) for at, size in there], memory)
        handle = _checked(nixl.initialize_xfer, "READ", near, far, remote)
        read = Read(self, remote, handle)
        read.begin()
        return read

    def knows(self, remote: str) -> bool:
        """Whether it can be read from: giving up a read may have closed the connection."""
        return remote in self._remotes

    def forget(self, remote: str) -> None:
        """Close the connection to another agent; reads from it fail."""
        if remote in self._remotes:
            self._remotes.discard(remote)
            try:
                _checked(self._nixl.remove_remote_agent, remote)
            except TransferError as error:
                logger.debug("encoder cache: forgetting %s: %s", remote, error)

    def close(self) -> None:
        """Forget the others and let go of the registered memory. The agent is of no use afterwards."""
        if self._nixl is None:
            return
        for remote in list(self._remotes):
            self.forget(remote)
        for region in self._registered:
            try:
                _checked(self._nixl.deregister_memory, region)
            except TransferError as error:
                logger.warning("encoder cache: memory stays registered: %s", error)
        self._registered.clear()
        self._nixl = None


class Read:
    """One read under way. `poll` it until it is not ``reading``; `cancel` it where a deadline passes."""

    def __init__(self, agent: Agent, remote: str, handle: Any) -> None:
        self._agent = agent
        self._remote = remote
        self._handle = handle
        self.state: State = "reading"
        self.error = ""

    def begin(self) -> None:
        """Post it. `Agent.read` has done so."""
        self._advance(self._agent._nixl.transfer)

    def poll(self) -> State:
        """Its state now; never waits. ``error`` says why it failed."""
        if self.state == "reading":
            self._advance(self._agent._nixl.check_xfer_state)
        return self.state

    def cancel(self) -> bool:
        """Give it up.

        Returns:
            Whether nothing can write to the local memory any more. Where NIXL cannot stop it, the connection to its
            agent is closed, which fails every read from there; only if that does not help either is this False, and
            the memory must not be used again before `cancel` returns True.
        """
        if self.state == "reading":
            self.state, self.error = "failed", "cancelled"
        if self._let_go():
            return True
        self._agent.forget(self._remote)
        return self._let_go()

    def _advance(self, step: Any) -> None:
        try:
            answer = _checked(step, self._handle)
        except TransferError as error:
            self.state, self.error = "failed", str(error)
        else:
            self.state = "done" if answer == "DONE" else "reading" if answer == "PROC" else "failed"
            self.error = "NIXL reports an error" if self.state == "failed" else ""
        if self.state != "reading":
            self._let_go()

    def _let_go(self) -> bool:
        if self._handle is None:
            return True
        try:
            _checked(self._handle.release)
        except TransferError as error:
            logger.warning("encoder cache: a read from %s cannot be released yet: %s", self._remote, error)
            return False
        self._handle = None
        return True


def memory_kind(tensor: torch.Tensor) -> str:
    """NIXL's kind of the memory that a tensor lies in."""
    return "DRAM" if tensor.device.type == "cpu" else "VRAM"


def _device(tensor: torch.Tensor) -> int:
    return 0 if tensor.device.type == "cpu" else tensor.device.index or 0


def _paired(local: Sequence[Piece], remote: Sequence[Piece]) -> tuple[list[Piece], list[Piece]]:
    """Both sides cut where either of them is, so that piece k of one has the bytes of piece k of the other."""
    if sum(size for _, size in local) != sum(size for _, size in remote):
        raise ValueError("the two sides of a read differ in size")
    here: list[Piece] = []
    there: list[Piece] = []
    left, right = [p for p in reversed(local) if p[1]], [p for p in reversed(remote) if p[1]]
    while left and right:
        (a, size_a), (b, size_b) = left.pop(), right.pop()
        size = min(size_a, size_b)
        here.append((a, size))
        there.append((b, size))
        if size_a > size:
            left.append((a + size, size_a - size))
        if size_b > size:
            right.append((b + size, size_b - size))
    if not here:
        raise ValueError("a read of nothing")
    return here, there


def _checked(call: Any, *args: Any) -> Any:
    """NIXL's bindings raise classes of their own, all of them `Exception`s, which differ between its versions."""
    try:
        return call(*args)
    except Exception as error:
        raise TransferError(f"{type(error).__name__}: {error}") from error
