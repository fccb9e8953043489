"""Tickets in a pipe and marks in shared memory, which the worker can read after a child has died.

A ticket is the right to run one job. A child's pipe can hold several tickets, for jobs whose data
was sent in advance. The process that reads a ticket from the pipe owns it. So the worker can take
back jobs that the child has not started, even if the child hangs or has died. The kernel decides
races for a ticket, because each byte of a pipe is read only once.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import tempfile

from ....system import forks

_TICKET = struct.Struct("=q")
_TICKETS_PER_READ = 4096 // _TICKET.size
"""Largest number of tickets that one read takes back."""


class Tickets(forks.Forkable):
    """The pipe with the tickets of one child. Their numbers rise, and none is used twice.

    :param read_end: file descriptor, in the worker and in the child.
    :param write_end: file descriptor; only in the worker.
    """

    def __init__(self, read_end: int, write_end: int | None = None) -> None:
        # The child's copy of the read end shares this flag.
        os.set_blocking(read_end, False)
        self.read_end = read_end
        self._write_end = write_end
        forks.watch(self)

    @classmethod
    def create(cls) -> Tickets:
        """Make a new pipe, with both ends."""
        return cls(*os.pipe())

    def give(self, number: int) -> None:
        """Give the child a ticket.

        :param number: the number of the job.
        """
        assert self._write_end is not None
        os.write(self._write_end, _TICKET.pack(number))

    def take(self) -> int | None:
        """Wait for the next ticket, and take it.

        :returns: the number of the job; ``None``: the worker has ended, or has called :meth:`end`.
        """
        while True:
            try:
                data = os.read(self.read_end, _TICKET.size)
            except BlockingIOError:
                select.select([self.read_end], [], [])
                continue
            return _TICKET.unpack(data)[0] if data else None

    def take_back(self) -> list[int]:
        """Remove the tickets that the child has not taken, and return their numbers."""
        taken: list[int] = []
        while True:
            try:
                data = os.read(self.read_end, _TICKETS_PER_READ * _TICKET.size)
            except BlockingIOError:
                return taken
            if not data:
                return taken
            taken += [number for (number,) in _TICKET.iter_unpack(data)]

    def end(self) -> None:
        """Let the child end after it has taken the remaining tickets."""
        if self._write_end is not None:
            write_end, self._write_end = self._write_end, None
            os.close(write_end)

    def close(self) -> None:
        """Close the ends of the pipe that are open in this process."""
        self.end()
        read_end, self.read_end = self.read_end, -1
        if read_end >= 0:
            os.close(read_end)

    def after_fork_in_child(self) -> None:
        """Close the copied ends: only the worker and its child may have them open."""
        self.close()


class Marks:
    """The state of a child, in shared memory that the worker can read after the child has died.

    Each mark is one aligned word, so that a reader never sees it half written. Times are those of
    ``time.monotonic()``, which is the same in all processes of a machine.
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
        """Make new marks. All are zero."""
        with tempfile.TemporaryFile() as file:
            # Anonymous memory where the system supports it, otherwise the file.
            memory = getattr(os, "memfd_create", None)
            descriptor = os.dup(file.fileno()) if memory is None else memory("bgjobs")
        os.ftruncate(descriptor, mmap.PAGESIZE)
        return cls(descriptor)

    @property
    def started(self) -> int:
        """Number of the job that was started last; 0: none yet."""
        return self._numbers[self._STARTED]

    @property
    def started_at(self) -> float:
        """When that job was started."""
        return self._times[self._STARTED_AT]

    @property
    def finished(self) -> int:
        """Number of the job whose outcome was sent last; 0: none yet."""
        return self._numbers[self._FINISHED]

    def start(self, number: int, now: float) -> None:
        """Mark the start of a job. The child calls this before it imports the job's code."""
        self._times[self._STARTED_AT] = now
        self._numbers[self._STARTED] = number

    def finish(self, number: int) -> None:
        """Mark that the outcome of a job was sent. The child calls this."""
        self._numbers[self._FINISHED] = number

    def ask_stop(self, number: int, *, for_timeout: bool) -> None:
        """Mark the job to stop. The worker calls this before it sends SIGTERM.

        :param for_timeout: whether the job is stopped for its timeout, not by a cancel.
        """
        self._numbers[self._STOP_FOR_TIMEOUT] = for_timeout
        self._numbers[self._STOP] = number

    @property
    def stop(self) -> int:
        """Number of the job that was last asked to stop; 0: none yet."""
        return self._numbers[self._STOP]

    @property
    def stop_for_timeout(self) -> bool:
        """Whether that job has to stop because of its timeout."""
        return bool(self._numbers[self._STOP_FOR_TIMEOUT])

    def close(self) -> None:
        """Release the memory."""
        for view in (self._numbers, self._times, self._view):
            view.release()
        self._memory.close()
        os.close(self.descriptor)
