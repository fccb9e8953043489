"""The table of moves holds together with the statuses and with what outcomes make of a job."""

from __future__ import annotations

import itertools

from flask_bgjobs.job.statuses import CAN_CHANGE, JobStatus, OutcomeKind, settlement
from flask_bgjobs.store.transitions import MOVES


def test_outcomes_lead_where_a_settle_may_go() -> None:
    """Each of them, and each target is that of an outcome."""
    led_to = {
        settlement(
            kind,
            retry_count=used,
            retries=1,
            crash_count=crashes,
            max_crashes=2,
            suspect=False,
            cancel_requested=cancel,
            retry_delay=lambda number: 1.0,
        ).status
        for kind, used, crashes, cancel in itertools.product(
            OutcomeKind, (0, 1), (0, 1), (False, True)
        )
    }
    assert led_to == MOVES["settle"].targets


def test_every_status_is_reached_and_left() -> None:
    """But what has ended is left by hand only."""
    assert set().union(*(move.targets for move in MOVES.values())) == set(JobStatus)
    by_itself = ("promote", "claim", "settle")
    left = set().union(*(MOVES[name].sources for name in by_itself))
    assert left == {status for status in JobStatus if not status.is_final}


def test_changes_by_hand_are_moves() -> None:
    """A cancel also asks running jobs to stop, which is no move."""
    for name, statuses in CAN_CHANGE.items():
        assert set(statuses) - MOVES[name].sources <= {JobStatus.RUNNING}
        assert MOVES[name].sources <= set(statuses)
