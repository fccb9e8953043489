"""The roll-up table: workers add counts, and charts show them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import run_background_job
from flask_bgjobs.job.rollup import HOUR, MINUTE, RUN, WAIT, Cell
from flask_bgjobs.models import Rollup
from flask_bgjobs.operations.queries import PERIODS, chart, finished_by_queue
from flask_bgjobs.state import AppState
from flask_bgjobs.store import Store
from flask_bgjobs.store.statements.rollup import Rollups
from tests.conftest import wait_until
from tests.integration.test_worker import running_worker


def _cell(begins_at: dt.datetime, bucket: int = 0, seconds: int = MINUTE) -> Cell:
    return Cell(seconds, begins_at, "default", "completed", RUN, bucket)


def _counts(store: Store) -> list[tuple[int, int]]:
    with store.read() as connection:
        rows = connection.execute(
            sa.select(Rollup.bucket, Rollup.jobs).order_by(Rollup.begins_at, Rollup.bucket)
        )
        return [tuple(row) for row in rows]


def test_counts_are_added(app: Flask, store: Store) -> None:
    """The counts of several workers for one period are added."""
    noon = dt.datetime(2026, 1, 1, 12)
    store.add_to_rollup({_cell(noon): 2, _cell(noon, 1): 1})
    store.add_to_rollup({_cell(noon): 3, _cell(noon, 2): 4})
    assert _counts(store) == [(0, 5), (1, 1), (2, 4)]


def test_old_counts_are_pruned(app: Flask, store: Store) -> None:
    """Counts by minute are kept for two hours, and counts by hour for eight days."""
    now = store.clock()
    kept = {
        _cell(now - dt.timedelta(minutes=100), 1): 1,
        _cell(now - dt.timedelta(days=7), 2, HOUR): 1,
    }
    gone = {
        _cell(now - dt.timedelta(minutes=130), 3): 1,
        _cell(now - dt.timedelta(days=9), 4, HOUR): 1,
    }
    store.add_to_rollup({**kept, **gone})
    store.prune_rollup()
    assert sorted(_counts(store)) == [(1, 1), (2, 1)]


def test_worker_writes_its_counts(state: AppState, run: Any) -> None:
    """When a worker has stopped, the charts contain all its jobs."""
    for _ in range(3):
        run_background_job("tests.jobs.echo", parameters=["x"], queue="mail")
    run_background_job("tests.jobs.fail", parameters=["no"], retries=0)
    run_background_job("tests.jobs.fail", parameters=["no"], retries=1, retry_delay=60)
    run("worker", "--burst")
    for name, period in PERIODS.items():
        drawn = chart(state, state.store.clock(), period)
        assert drawn, name
        assert drawn.totals == {"completed": 3, "retrying": 1, "failed": 1, "cancelled": 0}
        assert len(drawn.bars) == period.steps
        assert drawn.highest in (3, 4, 5)
        assert drawn.run_p50 is not None
        assert drawn.wait_p95 is not None
    lines = finished_by_queue(state, state.store.clock())
    assert {queue: sum(line) for queue, line in lines.items()} == {"mail": 3, "default": 2}


@pytest.mark.slow
def test_outage_loses_no_counts(
    app: Flask, state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts that could not be written during an outage are written once afterwards."""
    written: list[int] = []
    real = Rollups.add_to_rollup

    def fail_first(store: Rollups, counts: Mapping[Cell, int]) -> None:
        written.append(len(counts))
        if len(written) < 3:
            raise sa.exc.OperationalError("INSERT", None, Exception("the link is dead"))
        real(store, counts)

    monkeypatch.setattr(Rollups, "add_to_rollup", fail_first)
    for _ in range(3):
        run_background_job("tests.jobs.echo", parameters=["x"])
    with running_worker(app):
        wait_until(lambda: chart(state, state.store.clock()), "the numbers")
    assert chart(state, state.store.clock()).totals["completed"] == 3


def test_empty_chart(app: Flask, state: AppState) -> None:
    """Before any job has run, a chart has empty bars and no times."""
    drawn = chart(state, state.store.clock())
    assert not drawn
    assert drawn.highest == 0
    assert drawn.wait_p50 is None


def test_chart_shows_only_its_period(app: Flask, state: AppState, store: Store) -> None:
    """A chart does not include older counts that are still stored."""
    now = store.clock()
    store.add_to_rollup({_cell(now - dt.timedelta(minutes=90)): 7, _cell(now): 2})
    drawn = chart(state, now)
    assert drawn.totals["completed"] == 2
    assert drawn.bars[-1].total + drawn.bars[-2].total == 2


def test_wait_and_run_percentiles_are_separate(app: Flask, state: AppState, store: Store) -> None:
    """The percentiles of wait times and of run times are independent."""
    now = store.clock()
    store.add_to_rollup({_cell(now, 0): 10, _cell(now, 40)._replace(measure=WAIT): 10})
    drawn = chart(state, state.store.clock())
    assert drawn.run_p50 == pytest.approx(0.001, rel=0.2)
    assert drawn.wait_p50 == pytest.approx(1.1, rel=0.1)
    assert drawn.totals["completed"] == 10
