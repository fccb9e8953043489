"""What worker and child share: messages, the channel, tickets and marks."""

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
    suspect=True,
    crash_count=1,
    meta_json=None,
    run_at=NOW,
    claimed_at=NOW,
    started_at=NOW,
)


def across(message: Any) -> Any:
    return json.loads(json.dumps(message))


@pytest.mark.parametrize("spec", [SPEC, SPEC._replace(started_at=None, method="run")])
def test_a_spec_crosses_unchanged(spec: JobSpec) -> None:
    """A job reaches the child as it was claimed."""
    assert messages.unpack_spec(across(messages.pack_spec(spec))) == spec


@pytest.mark.parametrize("kind", OutcomeKind)
@pytest.mark.parametrize(
    "report", [None, Report(), Report(0.5, "half", '{"a":1}', ("one", "zw\u00f6lf"))]
)
def test_an_outcome_crosses_unchanged(kind: OutcomeKind, report: Report | None) -> None:
    """Every outcome reaches the worker as the child saw it, with its kind and its report."""
    outcome = Outcome(
        7, 2, kind, "[1]", "E", "E: no", "Traceback", 1.0, 0.25, 2.5, report, ("user", "*rest")
    )
    back = messages.unpack_outcome(across(messages.pack_outcome(outcome)))
    assert back == outcome
    assert back.kind is kind


@pytest.fixture
def ends() -> Iterator[tuple[ParentEnd, ChildEnd]]:
    """Both ends of a channel."""
    ours, theirs = socket.socketpair()
    parent, child = ParentEnd(ours), ChildEnd(theirs)
    yield parent, child
    parent.close()
    theirs.close()


class TestChannel:
    @given(st.lists(st.recursive(st.none() | st.integers() | st.text(), st.lists), max_size=20))
    def test_messages_arrive_whole_and_in_order(self, sent: list[Any]) -> None:
        """What is sent arrives, once each, in order, in both directions."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            parent, child = ParentEnd(ours), ChildEnd(theirs)
            for message in sent:
                parent.send(message)
            parent.flush()
            assert [child.receive() for _ in sent] == sent
            for message in sent:
                child.send(message)
            assert list(parent.receive()) == sent

    def test_the_parent_never_waits_for_a_reader(self, ends: tuple[ParentEnd, ChildEnd]) -> None:
        """What the child does not read is kept, and sent when it does."""
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

    def test_half_a_message_is_none(self) -> None:
        """A message cut short by the child's death is not taken for one."""
        ours, theirs = socket.socketpair()
        parent = ParentEnd(ours)
        theirs.sendall(b"\0\0\0\x09[1,2,3")
        theirs.close()
        assert list(parent.receive()) == []
        assert parent.is_closed
        parent.close()

    def test_a_gone_child_is_no_error(self) -> None:
        """Sending to a child that is gone is given up in silence: its exit tells the rest."""
        ours, theirs = socket.socketpair()
        theirs.close()
        parent = ParentEnd(ours)
        parent.send([1])
        parent.flush()
        assert not parent.has_outgoing
        parent.close()

    def test_a_gone_worker_ends_the_childs_read(self) -> None:
        """A child that waits for a message learns that the worker is gone."""
        ours, theirs = socket.socketpair()
        ours.close()
        child = ChildEnd(theirs)
        with pytest.raises(EOFError):
            child.receive()
        theirs.close()


class TestTickets:
    def test_whoever_reads_a_ticket_has_it(self) -> None:
        """A ticket is either taken by the child or taken back, never both."""
        tickets = Tickets.create()
        for number in range(1, 2_001):
            tickets.give(number)
        taken = [tickets.take() for _ in range(700)]
        back = tickets.take_back()
        assert taken == list(range(1, 701))
        assert back == list(range(701, 2_001))
        assert tickets.take_back() == []
        tickets.close()

    def test_the_end_is_told_after_the_last_ticket(self) -> None:
        """A child takes the tickets that are left, and then learns that there are no more."""
        tickets = Tickets.create()
        tickets.give(1)
        tickets.end()
        assert [tickets.take(), tickets.take()] == [1, None]
        assert tickets.take_back() == []
        tickets.close()


class TestMarks:
    def test_another_process_sees_them(self) -> None:
        """What a child marks is seen by the worker, also after the child's death."""
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


def test_reports_add_up() -> None:
    """Two reports as one: the later values, and all lines in order."""
    first = Report(0.1, "one", "{}", ("a",))
    assert first.followed_by(None) == first
    assert first.followed_by(Report(lines=("b",))) == Report(0.1, "one", "{}", ("a", "b"))
    later = Report(0.9, "two", '{"x":1}', ())
    assert first.followed_by(later) == Report(0.9, "two", '{"x":1}', ("a",))
