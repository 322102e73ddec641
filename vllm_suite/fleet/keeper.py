"""Runs one command and leaves nothing of it behind, whatever happens to the command or to the parent.

    python -I -S keeper.py PARENT_PID STOP_TIMEOUT_S COMMAND [ARGUMENT...]

The keeper ends when the command does, with its status (128 + N after signal N). SIGTERM is passed on to the
command; what still runs after STOP_TIMEOUT_S seconds, or after a second SIGTERM, is killed. The death of the
parent counts as SIGTERM. Every descendant is found, because orphans are handed to the keeper, and every one has
ended before the keeper does. Shared memory that they mapped and that nobody uses any more is removed.

Standard library only and started with -I -S: it has to be there in milliseconds and to stay small.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
# The death of a parent with several threads arrives as several signals at once; they are one request.
_ONE_REQUEST_S = 0.5
_ORPHAN_GRACE_S = 3.0  # for what outlives the command; multiprocessing's resource tracker cleans up in it
_LOOK_S, _SAMPLE_S = 1.0, 15.0
_SHM = "/dev/shm/"
_PROC = "/proc"


def prctl(option: int, value: int) -> None:
    """Linux's prctl; raises OSError where it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent has ended."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def processes() -> Iterator[tuple[int, list[str]]]:
    """Every process of this machine: its id and the fields of its /proc/PID/stat from the third, its state, on.

    Anybody's are among them, and a name may be any bytes, since the kernel cuts it at 15.
    """
    for entry in os.listdir(_PROC):
        if not entry.isdigit():
            continue
        try:
            stat = Path(_PROC, entry, "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:  # it ended meanwhile
            continue
        # The second field is the program's name in parentheses and may hold spaces.
        yield int(entry), stat.rpartition(")")[2].split()


def descendants(root: int) -> list[int]:
    """Process ids below `root`, parents before children, `root` left out. Ended ones count until reaped."""
    children: dict[int, list[int]] = {}
    for pid, fields in processes():
        children.setdefault(int(fields[1]), []).append(pid)
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(0), [])
        found += below
        queue += below
    return found


def shared_memory(pids: Iterable[int]) -> set[str]:
    """Files under /dev/shm that the processes have mapped now."""
    inodes: set[int] = set()
    for pid in pids:
        try:
            with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as lines:
                # Fields: range, access, offset, device, inode, path.
                inodes.update(int(line.split(maxsplit=5)[4]) for line in lines if _SHM in line)
        except OSError:  # it ended meanwhile, or belongs to another user
            continue
    # By inode: glibc maps a semaphore under a temporary name before it links the one that stays.
    with os.scandir(_SHM) as entries:
        return {entry.path for entry in entries if entry.inode() in inodes}


def remove_unused(names: Iterable[str]) -> list[str]:
    """Remove those of `names` that no process maps any more; returns what was removed."""
    left = {name for name in names if os.path.exists(name)}
    if not left:
        return []
    left -= shared_memory(int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    removed: list[str] = []
    for name in sorted(left):
        try:
            os.unlink(name)
        except OSError:  # its owner was quicker
            continue
        removed.append(name)
    return removed


def signal_all(pids: Iterable[int], number: int) -> None:
    """Send a signal to each process that is still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


class Keeper:
    """The keeper's state between signals."""

    def __init__(self, command: list[str], stop_timeout_s: float) -> None:
        self.command = command
        self.stop_timeout_s = stop_timeout_s
        self.child = 0
        self.status: int | None = None
        self.asked: float | None = None
        self.deadline: float | None = None
        self.shm: set[str] = set()
        self.shm_mtime: tuple[int, int] = (0, 0)  # of the folder, at the last look and the one before
        self.next_look = self.next_sample = 0.0

    def start(self) -> None:
        """Fork and exec the command; it dies with the keeper."""
        me = os.getpid()
        self.child = os.fork()
        if self.child:
            return
        try:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            if os.getppid() == me:
                os.execvp(self.command[0], self.command)
        except OSError as error:
            _say(f"cannot start {self.command[0]}: {error.strerror}")
        os._exit(127)

    def run(self) -> int:
        """Until the command and all it started have ended; returns the exit status."""
        self.start()
        while self.status is None:
            caught = signal.sigtimedwait(_SIGNALS, self._pause_s())
            if caught is not None and caught.si_signo != signal.SIGCHLD:
                self._stop()
            self._reap()
            self._tick()
        self._end_orphans()
        removed = remove_unused(self.shm)
        if removed:
            _say(f"removed shared memory left behind: {' '.join(removed)}")
        return self.status

    def _stop(self) -> None:
        now = time.monotonic()
        if self.asked is not None:
            if now - self.asked >= _ONE_REQUEST_S:
                self.deadline = now
            return
        self.asked = now
        self.deadline = now + self.stop_timeout_s
        self._sample()
        signal_all([self.child], signal.SIGTERM)
        # A process that was stopped cannot act on SIGTERM.
        signal_all(descendants(os.getpid()), signal.SIGCONT)

    def _pause_s(self) -> float:
        until = self.next_look if self.deadline is None else min(self.next_look, self.deadline)
        return max(0.0, until - time.monotonic())

    def _tick(self) -> None:
        now = time.monotonic()
        if self.deadline is not None and now >= self.deadline and self.status is None:
            _say(f"still running {now - (self.asked or now):.1f} s after SIGTERM; killing it")
            signal_all(descendants(os.getpid()), signal.SIGKILL)
            self.deadline = now + 1.0
        if now >= self.next_look:
            self.next_look = now + _LOOK_S
            before, last = self.shm_mtime
            self.shm_mtime = last, os.stat(_SHM).st_mtime_ns
            # Something was made or removed there since; once more after that, for a file that was not mapped yet.
            if last != self.shm_mtime[1] or before != last or now >= self.next_sample:
                self._sample()

    def _sample(self) -> None:
        self.shm |= shared_memory(descendants(os.getpid()))
        self.next_sample = time.monotonic() + _SAMPLE_S

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.child:
                code = os.waitstatus_to_exitcode(status)
                self.status = code if code >= 0 else 128 - code

    def _end_orphans(self) -> None:
        """The command has ended; what it started gets a moment to end too, then is killed."""
        orphans = descendants(os.getpid())
        self.shm |= shared_memory(orphans)
        signal_all(orphans, signal.SIGTERM)
        signal_all(orphans, signal.SIGCONT)
        deadline = time.monotonic() + _ORPHAN_GRACE_S
        while orphans := descendants(os.getpid()):
            if time.monotonic() >= deadline:
                _say(f"killing {len(orphans)} processes that outlived the command")
                signal_all(orphans, signal.SIGKILL)
                deadline += _ORPHAN_GRACE_S
            signal.sigtimedwait({signal.SIGCHLD}, 0.05)
            self._reap()


def _say(text: str) -> None:
    print(f"vllm-suite keeper: {text}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """Entry point; `argv` as in the module's text."""
    parent, stop_timeout_s, command = int(argv[0]), float(argv[1]), argv[2:]
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    adopt_orphans()
    if os.getppid() != parent:  # it died before the line above
        return 128 + signal.SIGTERM
    return Keeper(command, stop_timeout_s).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
