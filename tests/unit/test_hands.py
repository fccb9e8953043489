"""Hands: one thread for what is brief, all for what is not, and nothing is left lying."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flask_bgjobs.execution.pools.hands import Hands
from tests.conftest import DEADLINE_SECONDS, wait_until

SIZE = 4


class Work:
    """Pieces of work, and how they were done."""

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], object]] = deque()
        self.by: list[int] = []
        """Which thread did each piece."""
        self.hands = Hands(SIZE, self._next, lambda: bool(self.waiting))

    def give(self, *pieces: Callable[[], object]) -> None:
        self.waiting.extend(pieces)
        self.hands.call(len(pieces))

    def is_done(self, pieces: int) -> bool:
        return len(self.by) >= pieces

    def changes(self) -> int:
        """How often the next piece was done by another thread."""
        return sum(a != b for a, b in zip(self.by, self.by[1:], strict=False))

    def _next(self) -> bool:
        try:
            piece = self.waiting.popleft()
        except IndexError:
            return False
        piece()
        self.by.append(threading.get_ident())
        return True


@pytest.fixture
def work() -> Iterator[Work]:
    work = Work()
    yield work
    work.hands.close()


def nothing() -> None:
    """Takes no time."""


def test_what_is_brief_stays_with_one_thread(work: Work, tmp_path: Path) -> None:
    """Threads do not hand work to each other that is done sooner than handed over."""
    with (tmp_path / "journal").open("w") as journal:
        work.give(*[lambda: os.write(journal.fileno(), b"a line")] * 5_000)
        wait_until(lambda: work.is_done(5_000), "the work")
    assert work.changes() < 500


def test_nobody_waits_for_what_takes_long(work: Work) -> None:
    """While one piece takes long, another thread does those behind it."""
    behind = threading.Event()
    in_time: list[bool] = []
    work.give(*[nothing] * 100)
    wait_until(lambda: work.is_done(100), "the brief ones")
    work.give(lambda: in_time.append(behind.wait(DEADLINE_SECONDS)), behind.set)
    wait_until(lambda: work.is_done(102), "both")
    assert in_time == [True]


def test_all_threads_come_where_all_work_takes_long(work: Work) -> None:
    """As many pieces that take long are done at once as there are threads."""
    meeting = threading.Barrier(SIZE)
    for _ in range(3):
        work.give(*[lambda: meeting.wait(DEADLINE_SECONDS)] * SIZE)
    wait_until(lambda: work.is_done(3 * SIZE), "all meetings")
    assert len(set(work.by)) == SIZE


def test_what_takes_a_little_longer_is_shared_at_once(work: Work) -> None:
    """Work just too long to be called brief goes to all threads, though none is ever held up."""
    work.give(*[lambda: time.sleep(0.0004)] * 400)
    wait_until(lambda: work.is_done(400), "the work")
    assert len(set(work.by)) == SIZE


def test_who_becomes_free_beside_a_long_one_works_on(work: Work) -> None:
    """As long as one piece takes, a thread that ends another one does what waits behind."""
    go_on = threading.Event()
    for _ in range(200):
        count = len(work.by)
        # All but one thread are held; what that one does is long enough to be relieved of it.
        work.give(*[lambda: go_on.wait(DEADLINE_SECONDS)] * (SIZE - 1))
        work.give(*[lambda: time.sleep(0.003)] * 2, *[nothing] * 3)
        wait_until(lambda count=count: work.is_done(count + 5), "those that are not held")  # type: ignore[misc]
        go_on.set()
        wait_until(lambda count=count: work.is_done(count + SIZE + 4), "all")  # type: ignore[misc]
        go_on.clear()


def test_nobody_watches_threads_that_are_all_at_work(work: Work) -> None:
    """Where no thread could take over, none is called, however long the work takes."""
    go_on = threading.Event()
    work.give(*[lambda: go_on.wait(DEADLINE_SECONDS)] * SIZE * 2)
    wait_until(lambda: len(work.waiting) == SIZE, "all threads at work")
    time.sleep(0.5)
    assert work.hands._turns.qsize() <= 2 * SIZE
    go_on.set()
    wait_until(lambda: work.is_done(2 * SIZE), "the work")


def test_nothing_is_left_lying(work: Work) -> None:
    """Work that comes while threads stop, or go from one way to the other, is done."""
    given = 0
    for number in range(2_000):
        work.give(nothing if number % 50 else lambda: time.sleep(0.002))
        given += 1
        if number % 7 == 0:
            wait_until(lambda count=given: work.is_done(count), "all so far")  # type: ignore[misc]
    wait_until(lambda: work.is_done(given), "all")
    assert len(work.by) == given


def test_threads_end_when_closed() -> None:
    """After the work that waits, no thread is left."""
    before = set(threading.enumerate())
    work = Work()
    work.give(*[nothing] * 10)
    work.hands.close()
    wait_until(lambda: before.issuperset(threading.enumerate()), "the end of the threads")
    assert work.is_done(10)
