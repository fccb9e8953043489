"""Hands: the threads of a pool, as many at work as the jobs are worth.

Where jobs take microseconds, threads lose more time in handing the GIL to each other than they
gain, also when a job only writes a line to a file. So one thread works at a time, with the others
ready to take over, until jobs turn out to take longer; then all do.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from ...system.threads import WorkerThread

_BRIEF_SECONDS = 0.0001
"""What takes longer is worth a thread of its own."""
_SHARE_OF_NEWEST = 0.1
_MANY = 0.5
"""The share of work that takes longer at which all threads work."""
_ALL_SECONDS = 0.25
"""Then it is tried again, as it can only be measured with one at work."""
_HELD_UP_SECONDS = 0.001
"""After so long with the same piece of work, the next thread takes over."""


class Hands:
    """A fixed set of daemon threads that work off what waits.

    :param size: how many.
    :param work: does the next piece of work that waits; ``False``: there was none.
    :param is_waiting: whether there is any.
    """

    def __init__(self, size: int, work: Callable[[], bool], is_waiting: Callable[[], bool]) -> None:
        self._size = size
        self._work = work
        self._is_waiting = is_waiting
        self._turns: queue.SimpleQueue[bool] = queue.SimpleQueue()
        """Each lets a thread work; ``False`` ends it. It is all that threads wait for: a lock
        around the work would be held by a thread that has lost the GIL, with all others waiting
        for it."""
        self._baton = threading.Lock()
        """Held by the one that works; another lock takes its place when that one is held up."""
        self._resting: set[int] = set()
        """Threads that wait for a turn."""
        self._begun = 0
        self._share_of_long = 0.0
        self._all_until = 0.0
        self._watched: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.threads: list[threading.Thread] = [
            *(WorkerThread(self._serve, f"bgjobs-{number + 1}") for number in range(size)),
            WorkerThread(self._watch, "bgjobs-relay"),
        ]
        """The threads that must live until it is closed."""
        for thread in self.threads:
            thread.start()

    def call(self, pieces: int) -> None:
        """Let so many more pieces of work, which wait already, be done."""
        if self._all_work:
            for _ in range(min(pieces, self._size)):
                self._turns.put(True)
        else:
            self._turns.put(True)
            self._watched.put(True)

    def close(self) -> None:
        """Let threads end when nothing waits."""
        for _ in range(self._size):
            self._turns.put(False)
        self._watched.put(False)

    @property
    def _all_work(self) -> bool:
        return time.monotonic() < self._all_until

    def _serve(self) -> None:
        while self._next_turn():
            if self._all_work:
                while self._all_work and self._work():
                    pass
            elif not self._work_alone():
                continue
            # What came, or was left, while it stopped.
            if self._is_waiting():
                self.call(self._size)
        while self._work():
            pass

    def _next_turn(self) -> bool:
        me = threading.get_ident()
        self._resting.add(me)
        if self._is_waiting():
            # Somebody else is to do it, who may be held up.
            self._watched.put(True)
        turn = self._turns.get()
        self._resting.discard(me)
        return turn

    def _work_alone(self) -> bool:
        """Work as long as it has the baton; whether it had."""
        baton = self._baton
        if not baton.acquire(blocking=False):
            return False
        try:
            while baton is self._baton and not self._all_work:
                began = time.monotonic()
                self._begun += 1
                if not self._work():
                    break
                self._note(time.monotonic() - began)
        finally:
            baton.release()
        return True

    def _note(self, seconds: float) -> None:
        is_long = seconds > _BRIEF_SECONDS
        self._share_of_long += _SHARE_OF_NEWEST * (is_long - self._share_of_long)
        if self._share_of_long > _MANY:
            self._share_of_long = 0.0
            self._all_until = time.monotonic() + _ALL_SECONDS

    def _watch(self) -> None:
        while self._watched.get():
            begun = -1
            # Who is at work and becomes free looks by itself for what waits.
            while self._is_waiting() and self._resting and not self._all_work:
                if begun == self._begun:
                    self._baton = threading.Lock()
                    self._turns.put(True)
                begun = self._begun
                time.sleep(_HELD_UP_SECONDS)
