"""The progress of a worker's loop, by which its heartbeat goes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flask_bgjobs.worker import heartbeat
from flask_bgjobs.worker.heartbeat import LoopProgress


def test_progress_is_expected_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that stands still before its first turn stands still as well."""
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
