"""The parts of supervision that need no process."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator

import pytest

from flask_bgjobs.cli.worker import without_option
from flask_bgjobs.system.exits import describe_exit
from flask_bgjobs.worker.supervisor.restarts import Restarts
from flask_bgjobs.worker.supervisor.supervised import STOP, TAKES_JOBS, Supervised
from tests.conftest import wait_until


def test_quick_failures_have_growing_pauses() -> None:
    """The first failure is answered at once; those that follow soon wait longer, up to 30 s."""
    restarts = Restarts()
    pauses = [restarts.pause(0.5, failed=True) for _ in range(2_000)]
    assert pauses[0] == 0.0
    for pause, most in zip(pauses[1:6], (1, 2, 4, 8, 16), strict=True):
        assert most / 2 <= pause <= most
    assert all(15 <= pause <= 30 for pause in pauses[6:])


@pytest.mark.parametrize(("lived_seconds", "failed"), [(60.0, True), (0.2, False)])
def test_pauses_begin_anew(lived_seconds: float, failed: bool) -> None:
    """After a long life, or an end in order, a failure is answered at once again."""
    restarts = Restarts()
    for _ in range(5):
        restarts.pause(0.5, failed=True)
    restarts.pause(lived_seconds, failed=failed)
    restarts.pause(60.0, failed=True)
    assert restarts.pause(60.0, failed=True) == 0.0
    assert restarts.pause(0.5, failed=True) <= 1.0


def test_an_end_in_order_is_answered_once_in_a_second() -> None:
    """A child that is meant to end from time to time does not make its place spin."""
    restarts = Restarts()
    for _ in range(3):
        assert restarts.pause(0.2, failed=False) == pytest.approx(0.8)
        assert restarts.pause(1.5, failed=False) == 0.0


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "exited with code 0"),
        (3, "exited with code 3"),
        (-signal.SIGKILL, "was killed by SIGKILL"),
        (-signal.SIGRTMIN - 1, f"was killed by signal {signal.SIGRTMIN + 1}"),
    ],
)
def test_ends_in_words(code: int, words: str) -> None:
    """The log says how a process has ended."""
    assert describe_exit(code) == words


@pytest.mark.parametrize("option", [["--processes", "4"], ["--processes=4"]])
def test_the_command_of_a_child(option: list[str]) -> None:
    """A child has the same command line, without the option that made it one of many."""
    words = ["-m", "flask", "worker", "-q", "high", "--burst"]
    line = [*words[:3], *option, *words[3:]]
    assert without_option(line, "--processes", has_value=True) == words
    assert without_option([*words, "--reload"], "--reload") == words


class TestSupervised:
    """The child's side: a stop that comes by two ways is one stop."""

    @pytest.fixture
    def supervisor(self) -> Iterator[socket.socket]:
        """The supervisor's end."""
        ours, theirs = socket.socketpair()
        self.stops: list[int] = []
        self.tie = Supervised(theirs.detach(), lambda: self.stops.append(1))
        with ours:
            yield ours

    def test_it_tells_when_it_takes_jobs(self, supervisor: socket.socket) -> None:
        """The supervisor learns that the worker is up."""
        self.tie.on_worker_started(object(), worker="me")
        assert supervisor.recv(1) == TAKES_JOBS

    def test_what_is_passed_on_and_seen_is_one_signal(self, supervisor: socket.socket) -> None:
        """A signal that reaches the child, and is passed on to it, is counted once; the second
        one counts when it is passed on."""
        self.tie.stop_once()
        self.tie.stop_once()
        supervisor.send(STOP)
        supervisor.send(STOP)
        wait_until(lambda: len(self.stops) == 2, "the second stop")
        supervisor.close()
        self.tie.stop_once()
        assert len(self.stops) == 2

    def test_a_supervisor_that_is_gone_is_a_stop(self, supervisor: socket.socket) -> None:
        """The worker stops in order, and once, when its supervisor's end is closed."""
        supervisor.close()
        wait_until(lambda: self.stops, "the stop")
        self.tie.stop_once()
        assert len(self.stops) == 1
