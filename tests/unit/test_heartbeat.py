"""The progress of a worker's loop, on which its heartbeat depends."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flask_bgjobs.worker import heartbeat
from flask_bgjobs.worker.heartbeat import LoopProgress


def test_loop_that_never_progresses_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that stops before its first turn is detected after the lease."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: clock.now))
    progress = LoopProgress(lease=30)
    clock.now += 29
    assert not progress.stands_still
    clock.now += 2
    assert progress.stands_still
    assert progress.seconds_since == 31
    progress.note()
    assert not progress.stands_still
