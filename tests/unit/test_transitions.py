"""The table of moves is consistent with the statuses and outcomes."""

from __future__ import annotations

import itertools

from flask_bgjobs.job.statuses import CAN_CHANGE, JobStatus, OutcomeKind, settlement
from flask_bgjobs.store.transitions import MOVES


def test_outcomes_match_targets_of_settle() -> None:
    """The statuses that outcomes lead to are exactly the targets of the move ``settle``."""
    reached = {
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
    assert reached == MOVES["settle"].targets


def test_status_can_be_reached_and_left() -> None:
    """Each status can be reached; without manual moves, all but final statuses can be left."""
    assert set().union(*(move.targets for move in MOVES.values())) == set(JobStatus)
    automatic = ("promote", "free", "claim", "settle")
    left = set().union(*(MOVES[name].sources for name in automatic))
    assert left == {status for status in JobStatus if not status.is_final}


def test_manual_changes_match_moves() -> None:
    """Manual changes match the moves, but for the cancel of a running job.

    It is only a request to stop.
    """
    for name, statuses in CAN_CHANGE.items():
        assert set(statuses) - MOVES[name].sources <= {JobStatus.RUNNING}
        assert MOVES[name].sources <= set(statuses)
