"""Who runs what, kept where it outlives the child: tickets in a pipe, marks in shared memory.

A ticket is the right to run one job. Several may wait in a child's pipe, each for a job whose
data was sent ahead; whoever reads a ticket from the pipe has it. So the worker can take back
what the child has not begun, from a child that lives, hangs or has died, and the system's own
pipe decides who was first.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import tempfile

from ....system import forks

_TICKET = struct.Struct("=q")
_AT_ONCE = 4096 // _TICKET.size
"""Tickets in one write: so many bytes a pipe takes whole."""


class Tickets(forks.Forkable):
    """The pipe of one child's tickets; numbers rise and none is used twice."""

    def __init__(self, read_end: int, write_end: int | None = None) -> None:
        # The flag is the pipe's: it holds for the child's copy of the read end as well.
        os.set_blocking(read_end, False)
        self.read_end = read_end
        self._write_end = write_end
        forks.watch(self)

    @classmethod
    def create(cls) -> Tickets:
        """A new pipe, with both ends."""
        return cls(*os.pipe())

    def give(self, number: int) -> None:
        """Let the child run the job ``number``."""
        assert self._write_end is not None
        os.write(self._write_end, _TICKET.pack(number))

    def take(self) -> int | None:
        """The next ticket, waited for; ``None`` when the worker is gone."""
        while True:
            try:
                data = os.read(self.read_end, _TICKET.size)
            except BlockingIOError:
                select.select([self.read_end], [], [])
                continue
            return _TICKET.unpack(data)[0] if data else None

    def take_back(self) -> list[int]:
        """The tickets that the child has not taken; it never will."""
        taken: list[int] = []
        while True:
            try:
                data = os.read(self.read_end, _AT_ONCE * _TICKET.size)
            except BlockingIOError:
                return taken
            if not data:
                return taken
            taken += [number for (number,) in _TICKET.iter_unpack(data)]

    def end(self) -> None:
        """Let the child end when it has taken the tickets that are left."""
        if self._write_end is not None:
            write_end, self._write_end = self._write_end, None
            os.close(write_end)

    def close(self) -> None:
        """Close the ends that this process has."""
        self.end()
        read_end, self.read_end = self.read_end, -1
        if read_end >= 0:
            os.close(read_end)

    def after_fork_in_child(self) -> None:
        """Close a copy's ends: only the worker and its child may hold them."""
        self.close()


class Marks:
    """What a child is doing, in memory that the worker reads also after the child's death.

    Each mark is one aligned word, so that it is never seen half written. Times are those of
    ``time.monotonic()``, which all processes of a machine share.
    """

    _STARTED, _FINISHED, _STOP, _STOP_FOR_TIMEOUT, _STARTED_AT = range(5)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, mmap.PAGESIZE)
        self._view = memoryview(self._memory)
        self._numbers = self._view.cast("q")
        self._times = self._view.cast("d")

    @classmethod
    def create(cls) -> Marks:
        """New marks, all zero."""
        with tempfile.TemporaryFile() as file:
            # Memory where the system has it without a file.
            memory = getattr(os, "memfd_create", None)
            descriptor = os.dup(file.fileno()) if memory is None else memory("bgjobs")
        os.ftruncate(descriptor, mmap.PAGESIZE)
        return cls(descriptor)

    @property
    def started(self) -> int:
        """The job that was started last; 0 before the first."""
        return self._numbers[self._STARTED]

    @property
    def started_at(self) -> float:
        """When that was."""
        return self._times[self._STARTED_AT]

    @property
    def finished(self) -> int:
        """The job whose outcome was sent last."""
        return self._numbers[self._FINISHED]

    def start(self, number: int, now: float) -> None:
        """Mark the start of a job, before its code is looked up."""
        self._times[self._STARTED_AT] = now
        self._numbers[self._STARTED] = number

    def finish(self, number: int) -> None:
        """Mark that the outcome of a job was sent."""
        self._numbers[self._FINISHED] = number

    def ask_stop(self, number: int, *, for_timeout: bool) -> None:
        """Say which job the signal that follows is meant for."""
        self._numbers[self._STOP_FOR_TIMEOUT] = for_timeout
        self._numbers[self._STOP] = number

    @property
    def stop(self) -> int:
        """The job that is to stop; 0 when there was none yet."""
        return self._numbers[self._STOP]

    @property
    def stop_for_timeout(self) -> bool:
        """Whether it is to stop because its time is up."""
        return bool(self._numbers[self._STOP_FOR_TIMEOUT])

    def close(self) -> None:
        """Give the memory back."""
        for view in (self._numbers, self._times, self._view):
            view.release()
        self._memory.close()
        os.close(self.descriptor)
