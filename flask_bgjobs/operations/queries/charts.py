"""Charts of the finished attempts and their wait and run times, over the last hour, day or week.

They are read from the roll-up table, so that the cost does not grow with the number of jobs. The
table is some seconds behind, and lacks the numbers that a worker had not written when it was
killed.
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
    """A period that ends now, divided into steps."""

    name: str
    """The name in URLs: ``1h``, ``24h`` or ``7d``."""
    words: str
    """The label on pages, such as ``last hour``."""
    cell_seconds: int
    """Length of the roll-up cells that are read."""
    step_seconds: int
    """Length of a step, a multiple of ``cell_seconds``."""
    steps: int
    """Number of steps."""


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
    """The attempts that finished in one step of a chart."""

    begins_at: dt.datetime
    counts: Mapping[str, int]
    """Number of attempts for each of :data:`~flask_bgjobs.job.rollup.OUTCOMES`."""

    @property
    def total(self) -> int:
        """Number of attempts with any outcome."""
        return sum(self.counts.values())


@dataclasses.dataclass(frozen=True, slots=True)
class Chart:
    """The finished attempts of a period."""

    period: Period
    bars: list[Bar]
    """Oldest first; the last one is still growing."""
    totals: Mapping[str, int]
    """Number of attempts by outcome."""
    wait_p50: float | None
    """Median of the seconds from the due time to the start; ``None`` when nothing was measured."""
    wait_p95: float | None
    """95th percentile of these seconds."""
    run_p50: float | None
    """Median of the seconds that the code ran; ``None`` when nothing was measured."""
    run_p95: float | None
    """95th percentile of these seconds."""

    @property
    def highest(self) -> int:
        """The highest total of a bar."""
        return max(bar.total for bar in self.bars)

    def __bool__(self) -> bool:
        return any(self.totals.values())


def chart(state: AppState, now: dt.datetime, period: Period = DEFAULT_PERIOD) -> Chart:
    """The finished attempts of ``period``, of all queues together.

    :param now: the database's clock.
    """
    begin = _first_step(now, period)
    with state.store.read() as connection:
        in_period = (_rollup.c.seconds == period.cell_seconds, _rollup.c.begins_at >= begin)
        jobs = sa.func.sum(_rollup.c.jobs)
        by_outcome = (
            sa.select(_rollup.c.begins_at, _rollup.c.outcome, sa.null(), jobs)
            .where(*in_period, _rollup.c.measure == RUN)
            .group_by(_rollup.c.begins_at, _rollup.c.outcome)
        )
        by_duration = (
            sa.select(sa.null(), _rollup.c.measure, _rollup.c.bucket, jobs)
            .where(*in_period)
            .group_by(_rollup.c.measure, _rollup.c.bucket)
        )
        rows = connection.execute(sa.union_all(by_outcome, by_duration)).all()
    bars = _bars([(at, outcome, n) for at, outcome, _, n in rows if at is not None], begin, period)
    times: dict[str, dict[int, int]] = {RUN: {}, WAIT: {}}
    # Rows of the second query have no time.
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
    """The finished attempts in each minute of the last hour, oldest first, by queue.

    :param now: the database's clock.
    """
    period = DEFAULT_PERIOD
    begin = _first_step(now, period)
    with state.store.read() as connection:
        rows = connection.execute(
            sa.select(_rollup.c.queue, _rollup.c.begins_at, sa.func.sum(_rollup.c.jobs))
            .where(
                _rollup.c.seconds == period.cell_seconds,
                _rollup.c.begins_at >= begin,
                _rollup.c.measure == RUN,
            )
            .group_by(_rollup.c.queue, _rollup.c.begins_at)
        ).all()
    lines: dict[str, list[int]] = collections.defaultdict(lambda: [0] * period.steps)
    for queue, begins_at, jobs in rows:
        step = _step_of(begins_at, begin, period)
        if step < period.steps:
            lines[queue][step] += int(jobs)
    return lines


def _first_step(now: dt.datetime, period: Period) -> dt.datetime:
    """The begin of the oldest step of the period; the newest step contains ``now``."""
    epoch = dt.datetime(1970, 1, 1)
    newest = int((now - epoch).total_seconds()) // period.step_seconds
    return epoch + dt.timedelta(seconds=(newest - period.steps + 1) * period.step_seconds)


def _step_of(begins_at: dt.datetime, begin: dt.datetime, period: Period) -> int:
    return int((begins_at - begin).total_seconds()) // period.step_seconds


def _bars(rows: Iterable[Any], begin: dt.datetime, period: Period) -> list[Bar]:
    counts = [dict.fromkeys(map(str, OUTCOMES), 0) for _ in range(period.steps)]
    for begins_at, outcome, jobs in rows:
        step = _step_of(begins_at, begin, period)
        # Later than the last step if the clock of the worker that wrote the row is ahead.
        if step < period.steps and outcome in counts[step]:
            counts[step][outcome] += int(jobs)
    width = dt.timedelta(seconds=period.step_seconds)
    return [Bar(begin + index * width, each) for index, each in enumerate(counts)]
