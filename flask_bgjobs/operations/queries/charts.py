"""Charts: what ended, and how long it waited and ran, over the last hour, day or week.

Read from the roll-up, so that a million jobs cost no more than ten. It lags behind by some
seconds, and lacks what a worker had not written when it was killed.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from ...job.rollup import HOUR, MINUTE, OUTCOMES, RUN, WAIT, percentile
from ...models import Rollup
from ...state import AppState

_rollup = Rollup.__table__


@dataclasses.dataclass(frozen=True, slots=True)
class Period:
    """A stretch of time up to now, in steps."""

    name: str
    """As in the address: ``1h``, ``24h`` or ``7d``."""
    words: str
    cell_seconds: int
    """Of the cells that it is read from."""
    step_seconds: int
    """Of a bar; a multiple of the above."""
    steps: int


PERIODS = {
    period.name: period
    for period in (
        Period("1h", "last hour", MINUTE, MINUTE, 60),
        Period("24h", "last 24 hours", HOUR, HOUR, 24),
        Period("7d", "last 7 days", HOUR, 6 * HOUR, 28),
    )
}
DEFAULT_PERIOD = PERIODS["1h"]


@dataclasses.dataclass(frozen=True, slots=True)
class Bar:
    """The attempts that ended in one step of a chart."""

    begins_at: dt.datetime
    counts: Mapping[str, int]
    """By outcome, of :data:`~flask_bgjobs.job.rollup.OUTCOMES`; 0 where there are none."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.counts.values())


@dataclasses.dataclass(frozen=True, slots=True)
class Chart:
    """What ended in a period."""

    period: Period
    bars: list[Bar]
    """Oldest first; the last one is not over yet."""
    totals: Mapping[str, int]
    """By outcome."""
    wait_p50: float | None
    """Seconds from being due to the start, as are the others; ``None``: nothing was measured."""
    wait_p95: float | None
    run_p50: float | None
    run_p95: float | None

    @property
    def highest(self) -> int:
        """The most that ended in one step."""
        return max(bar.total for bar in self.bars)

    def __bool__(self) -> bool:
        return any(self.totals.values())


def chart(state: AppState, now: dt.datetime, period: Period = DEFAULT_PERIOD) -> Chart:
    """What ended in ``period``, of all queues.

    :param now: the database's clock.
    """
    begin = _first_step(now, period)
    with state.store.read() as connection:
        wanted = (_rollup.c.seconds == period.cell_seconds, _rollup.c.begins_at >= begin)
        jobs = sa.func.sum(_rollup.c.jobs)
        ended = (
            sa.select(_rollup.c.begins_at, _rollup.c.outcome, sa.null(), jobs)
            .where(*wanted, _rollup.c.measure == RUN)
            .group_by(_rollup.c.begins_at, _rollup.c.outcome)
        )
        took = (
            sa.select(sa.null(), _rollup.c.measure, _rollup.c.bucket, jobs)
            .where(*wanted)
            .group_by(_rollup.c.measure, _rollup.c.bucket)
        )
        rows = connection.execute(sa.union_all(ended, took)).all()
    bars = _bars([(at, outcome, n) for at, outcome, _, n in rows if at is not None], begin, period)
    times: dict[str, dict[int, int]] = {RUN: {}, WAIT: {}}
    for at, measure, bucket, number in rows:
        if at is None:
            times[measure][bucket] = int(number)
    return Chart(
        period=period,
        bars=bars,
        totals={outcome: sum(bar.counts[outcome] for bar in bars) for outcome in OUTCOMES},
        wait_p50=percentile(times[WAIT], 0.5),
        wait_p95=percentile(times[WAIT], 0.95),
        run_p50=percentile(times[RUN], 0.5),
        run_p95=percentile(times[RUN], 0.95),
    )


def finished_by_queue(state: AppState, now: dt.datetime) -> dict[str, list[int]]:
    """How many attempts ended in each minute of the last hour, oldest first, by queue.

    :param now: the database's clock.
    """
    period = DEFAULT_PERIOD
    begin = _first_step(now, period)
    with state.store.read() as connection:
        counted = connection.execute(
            sa.select(_rollup.c.queue, _rollup.c.begins_at, sa.func.sum(_rollup.c.jobs))
            .where(
                _rollup.c.seconds == period.cell_seconds,
                _rollup.c.begins_at >= begin,
                _rollup.c.measure == RUN,
            )
            .group_by(_rollup.c.queue, _rollup.c.begins_at)
        ).all()
    lines: dict[str, list[int]] = collections.defaultdict(lambda: [0] * period.steps)
    for queue, begins_at, jobs in counted:
        step = _step_of(begins_at, begin, period)
        if step < period.steps:
            lines[queue][step] += int(jobs)
    return lines


def _first_step(now: dt.datetime, period: Period) -> dt.datetime:
    """The begin of the oldest step, when the newest one holds ``now``."""
    epoch = dt.datetime(1970, 1, 1)
    newest = int((now - epoch).total_seconds()) // period.step_seconds
    return epoch + dt.timedelta(seconds=(newest - period.steps + 1) * period.step_seconds)


def _step_of(begins_at: dt.datetime, begin: dt.datetime, period: Period) -> int:
    return int((begins_at - begin).total_seconds()) // period.step_seconds


def _bars(counted: Iterable[Any], begin: dt.datetime, period: Period) -> list[Bar]:
    counts = [dict.fromkeys(map(str, OUTCOMES), 0) for _ in range(period.steps)]
    for begins_at, outcome, jobs in counted:
        step = _step_of(begins_at, begin, period)
        # A worker's clock may have been ahead.
        if step < period.steps and outcome in counts[step]:
            counts[step][outcome] += int(jobs)
    width = dt.timedelta(seconds=period.step_seconds)
    return [Bar(begin + index * width, each) for index, each in enumerate(counts)]
