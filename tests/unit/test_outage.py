"""How long a worker waits before it asks a database again that was not usable."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import OperationalError

from flask_bgjobs.worker.outage import Outage

ERROR = OperationalError("SELECT 1", {}, Exception("the server is gone"))


def test_pauses_grow_from_a_tenth_of_a_second_to_half_a_minute() -> None:
    """Each pause may be twice as long as the one before, and none is longer than 30 s."""
    outage = Outage("one")
    pauses = [outage.record_failure(ERROR, 0) for _ in range(20)]
    longest = [min(0.1 * 2**number, 30.0) for number in range(20)]
    for pause, most in zip(pauses, longest, strict=True):
        assert most / 2 <= pause <= most


def test_workers_do_not_come_all_at_once() -> None:
    """The pauses of workers that lost their database together differ."""
    assert len({Outage(f"{number}").record_failure(ERROR, 0) for number in range(20)}) > 1


def test_the_next_outage_begins_anew() -> None:
    """Once the database was usable again, the first pause is short again."""
    outage = Outage("one")
    for _ in range(10):
        outage.record_failure(ERROR, 0)
    outage.record_success()
    assert outage.record_failure(ERROR, 0) <= 0.1


def test_an_outage_is_told_from_its_first_error_to_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log says that the database is not usable, what is kept, and when that is over, once."""
    outage = Outage("one")
    outage.record_success()
    assert caplog.messages == []
    outage.record_failure(ERROR, 3)
    outage.record_success()
    outage.record_success()
    unusable, usable = caplog.messages
    assert "Database not usable | Worker: one" in unusable
    assert "Outcomes kept: 3 | Error: the server is gone" in unusable
    assert "Database usable again | Worker: one" in usable
