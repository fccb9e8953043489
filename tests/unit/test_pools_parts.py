"""The parts shared by worker and child: messages, the channel, tickets and marks."""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_bgjobs.execution.pools.process import messages
from flask_bgjobs.execution.pools.process.channel import ChildEnd, ParentEnd
from flask_bgjobs.execution.pools.process.tickets import Marks, Tickets
from flask_bgjobs.job.records import JobSpec, Outcome, Report
from flask_bgjobs.job.statuses import OutcomeKind

NOW = dt.datetime(2026, 11, 24, 12, 0, 0, 123456)
SPEC = JobSpec(
    id=2**40,
    target="shop.jobs.send",
    method=None,
    parameters_json='["ü\\u0000"]',
    queue="mail",
    priority=-3,
    attempt=2,
    worker_id=7,
    retry_count=1,
    retries=3,
    retry_delay="[5.0]",
    backoff="fixed",
    max_retry_delay=None,
    jitter=0.5,
    timeout=1.5,
    failure_rules=None,
    suspect=True,
    crash_count=1,
    meta_json=None,
    run_at=NOW,
    claimed_at=NOW,
    started_at=NOW,
    deadline_at=NOW,
    waiting_since=NOW,
    limits_json=None,
)


def through_json(message: Any) -> Any:
    return json.loads(json.dumps(message))


@pytest.mark.parametrize("spec", [SPEC, SPEC._replace(started_at=None, method="run")])
def test_spec_round_trip(spec: JobSpec) -> None:
    """The child receives a job unchanged."""
    assert messages.unpack_spec(through_json(messages.pack_spec(spec))) == spec


@pytest.mark.parametrize("kind", OutcomeKind)
@pytest.mark.parametrize(
    "report", [None, Report(), Report(0.5, "half", '{"a":1}', ("one", "zw\u00f6lf"))]
)
def test_outcome_round_trip(kind: OutcomeKind, report: Report | None) -> None:
    """The worker receives an outcome unchanged, with its kind and report."""
    outcome = Outcome(
        7, 2, kind, "[1]", "E", "E: no", "Traceback", 1.0, 0.25, 2.5, report, ("user", "*rest")
    )
    unpacked = messages.unpack_outcome(through_json(messages.pack_outcome(outcome)))
    assert unpacked == outcome
    assert unpacked.kind is kind


@pytest.fixture
def ends() -> Iterator[tuple[ParentEnd, ChildEnd]]:
    """Both ends of a channel."""
    parent_socket, child_socket = socket.socketpair()
    parent, child = ParentEnd(parent_socket), ChildEnd(child_socket)
    yield parent, child
    parent.close()
    child_socket.close()


class TestChannel:
    @given(st.lists(st.recursive(st.none() | st.integers() | st.text(), st.lists), max_size=20))
    @pytest.mark.slow
    def test_messages_arrive_once_and_in_order(self, sent: list[Any]) -> None:
        """Messages arrive whole, once and in order, in both directions."""
        parent_socket, child_socket = socket.socketpair()
        with parent_socket, child_socket:
            parent, child = ParentEnd(parent_socket), ChildEnd(child_socket)
            for message in sent:
                parent.send(message)
            parent.flush()
            assert [child.receive() for _ in sent] == sent
            for message in sent:
                child.send(message)
            assert list(parent.receive()) == sent

    def test_send_does_not_wait_for_reader(self, ends: tuple[ParentEnd, ChildEnd]) -> None:
        """Messages that the child has not read are kept, and sent once it reads."""
        parent, child = ends
        large = "x" * 3_000_000
        parent.send(large)
        parent.flush()
        assert parent.has_outgoing
        received: list[Any] = []

        def read() -> None:
            received.append(child.receive())

        import threading

        thread = threading.Thread(target=read)
        thread.start()
        while parent.has_outgoing:
            parent.flush()
        thread.join(10)
        assert received == [large]

    def test_incomplete_message_is_ignored(self) -> None:
        """A message cut off by the child's death is ignored."""
        parent_socket, child_socket = socket.socketpair()
        parent = ParentEnd(parent_socket)
        child_socket.sendall(b"\0\0\0\x09[1,2,3")
        child_socket.close()
        assert list(parent.receive()) == []
        assert parent.is_closed
        parent.close()

    def test_send_to_dead_child(self) -> None:
        """Sending to a dead child raises no error; the worker learns of its exit in another way."""
        parent_socket, child_socket = socket.socketpair()
        child_socket.close()
        parent = ParentEnd(parent_socket)
        parent.send([1])
        parent.flush()
        assert not parent.has_outgoing
        parent.close()

    def test_receive_from_dead_worker(self) -> None:
        """A child that waits for a message gets ``EOFError`` if the worker is gone."""
        parent_socket, child_socket = socket.socketpair()
        parent_socket.close()
        child = ChildEnd(child_socket)
        with pytest.raises(EOFError):
            child.receive()
        child_socket.close()


class TestTickets:
    def test_ticket_is_taken_once(self) -> None:
        """A ticket is either taken by the child or taken back, never both."""
        tickets = Tickets.create()
        for number in range(1, 2_001):
            tickets.give(number)
        taken_numbers = [tickets.take() for _ in range(700)]
        returned = tickets.take_back()
        assert taken_numbers == list(range(1, 701))
        assert returned == list(range(701, 2_001))
        assert tickets.take_back() == []
        tickets.close()

    def test_end_follows_last_ticket(self) -> None:
        """A child takes the remaining tickets before it gets the end."""
        tickets = Tickets.create()
        tickets.give(1)
        tickets.end()
        assert [tickets.take(), tickets.take()] == [1, None]
        assert tickets.take_back() == []
        tickets.close()


class TestMarks:
    def test_marks_are_shared_between_processes(self) -> None:
        """The worker sees the child's marks, even after the child's death."""
        marks = Marks.create()
        pid = os.fork()
        if pid == 0:
            marks.start(41, 1.5)
            marks.start(42, 2.5)
            marks.finish(41)
            os._exit(0)
        os.waitpid(pid, 0)
        assert (marks.started, marks.started_at, marks.finished) == (42, 2.5, 41)
        marks.ask_stop(42, for_timeout=True)
        assert (marks.stop, marks.stop_for_timeout) == (42, True)
        marks.close()


def test_reports_are_combined() -> None:
    """Combined reports have the later values and all log lines in order."""
    first = Report(0.1, "one", "{}", ("a",))
    assert first.followed_by(None) == first
    assert first.followed_by(Report(lines=("b",))) == Report(0.1, "one", "{}", ("a", "b"))
    later = Report(0.9, "two", '{"x":1}', ())
    assert first.followed_by(later) == Report(0.9, "two", '{"x":1}', ("a",))
