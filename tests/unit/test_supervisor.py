"""The parts of the supervisor that need no process."""

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


def test_restart_pauses_grow() -> None:
    """The first failure restarts the child at once; after quick failures, pauses grow to 30 s."""
    restarts = Restarts()
    pauses = [restarts.pause(0.5, failed=True) for _ in range(2_000)]
    assert pauses[0] == 0.0
    for pause, longest in zip(pauses[1:6], (1, 2, 4, 8, 16), strict=True):
        assert longest / 2 <= pause <= longest
    assert all(15 <= pause <= 30 for pause in pauses[6:])


@pytest.mark.parametrize(("lived_seconds", "failed"), [(60.0, True), (0.2, False)])
def test_restart_pauses_are_reset(lived_seconds: float, failed: bool) -> None:
    """After a long run or a normal exit, the next failure restarts the child at once."""
    restarts = Restarts()
    for _ in range(5):
        restarts.pause(0.5, failed=True)
    restarts.pause(lived_seconds, failed=failed)
    restarts.pause(60.0, failed=True)
    assert restarts.pause(60.0, failed=True) == 0.0
    assert restarts.pause(0.5, failed=True) <= 1.0


def test_normal_exit_restarts_once_per_second() -> None:
    """A child that exits normally again and again is restarted at most once per second."""
    restarts = Restarts()
    for _ in range(3):
        assert restarts.pause(0.2, failed=False) == pytest.approx(0.8)
        assert restarts.pause(1.5, failed=False) == 0.0


@pytest.mark.parametrize(
    ("code", "description"),
    [
        (0, "exited with code 0"),
        (3, "exited with code 3"),
        (-signal.SIGKILL, "was killed by SIGKILL"),
        (-signal.SIGRTMIN - 1, f"was killed by signal {signal.SIGRTMIN + 1}"),
    ],
)
def test_exit_descriptions(code: int, description: str) -> None:
    """The log describes how a process has exited."""
    assert describe_exit(code) == description


@pytest.mark.parametrize("option", [["--processes", "4"], ["--processes=4"]])
def test_child_command_line(option: list[str]) -> None:
    """A child has the supervisor's command line, without ``--processes`` or ``--reload``."""
    arguments = ["-m", "flask", "worker", "-q", "high", "--burst"]
    command_line = [*arguments[:3], *option, *arguments[3:]]
    assert without_option(command_line, "--processes", has_value=True) == arguments
    assert without_option([*arguments, "--reload"], "--reload") == arguments


class TestSupervised:
    """The child's side: a stop received in two ways counts once."""

    @pytest.fixture
    def supervisor(self) -> Iterator[socket.socket]:
        """The supervisor's end of the socket."""
        supervisor_end, child_end = socket.socketpair()
        self.stops: list[int] = []
        self.supervised = Supervised(child_end.detach(), lambda: self.stops.append(1))
        with supervisor_end:
            yield supervisor_end

    def test_child_reports_that_it_takes_jobs(self, supervisor: socket.socket) -> None:
        """The child tells the supervisor when its worker takes jobs."""
        self.supervised.on_worker_started(object(), worker="me")
        assert supervisor.recv(1) == TAKES_JOBS

    def test_forwarded_signal_counts_once(self, supervisor: socket.socket) -> None:
        """A signal that the child receives directly and from its supervisor counts once.

        The second signal counts when it is forwarded.
        """
        self.supervised.stop_once()
        self.supervised.stop_once()
        supervisor.send(STOP)
        supervisor.send(STOP)
        wait_until(lambda: len(self.stops) == 2, "the second stop")
        supervisor.close()
        self.supervised.stop_once()
        assert len(self.stops) == 2

    def test_lost_supervisor_stops_child(self, supervisor: socket.socket) -> None:
        """If the supervisor's end is closed, the worker stops gracefully, and only once."""
        supervisor.close()
        wait_until(lambda: self.stops, "the stop")
        self.supervised.stop_once()
        assert len(self.stops) == 1
