"""How long a worker waits before it tries an unusable database again."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import OperationalError

from flask_bgjobs.worker.outage import Outage

ERROR = OperationalError("SELECT 1", {}, Exception("the server is gone"))


def test_pauses_grow_to_30_seconds() -> None:
    """The longest possible pause doubles from 0.1 s to 30 s."""
    outage = Outage("one")
    pauses = [outage.record_failure(ERROR, 0) for _ in range(20)]
    longest = [min(0.1 * 2**number, 30.0) for number in range(20)]
    for pause, limit in zip(pauses, longest, strict=True):
        assert limit / 2 <= pause <= limit


def test_pauses_differ_between_workers() -> None:
    """Workers that lose their database together retry at different times."""
    assert len({Outage(f"{number}").record_failure(ERROR, 0) for number in range(20)}) > 1


def test_success_resets_pause() -> None:
    """Once the database is usable again, the first pause of the next outage is short."""
    outage = Outage("one")
    for _ in range(10):
        outage.record_failure(ERROR, 0)
    outage.record_success()
    assert outage.record_failure(ERROR, 0) <= 0.1


def test_outage_is_logged_at_start_and_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The start of an outage is logged with the number of outcomes kept, and its end once."""
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
