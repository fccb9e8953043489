"""Heal: find seats and jobs that do not match, as after an edit by hand, and put them right."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from ...job.limits import uses_from_json, uses_to_json
from ...job.statuses import JobStatus
from ...models import SeatState
from .. import transitions
from ..database import JOBS, LIMIT_KEYS, LIMITS, NOTICES, SEATS
from .admit import IS_AT_LIMIT, Admissions
from .limit_keys import effective_rule
from .seats import seat

_ROWS_PER_STEP = 1_000
_KEYS_PER_STEP = 500
_WAITS, _HOLDS, _PARKED = SeatState.WAITS.value, SeatState.HOLDS.value, SeatState.PARKED.value
_MAY_HOLD = sa.or_(
    JOBS.c.status.in_([JobStatus.PENDING.value, JobStatus.RUNNING.value]), IS_AT_LIMIT
)
"""The condition that a job may have a seat."""


@dataclasses.dataclass(slots=True)
class Cursors:
    """Where the next call of :meth:`Heals.heal` goes on. Each starts again at the end."""

    seat_0: int = 0
    seat_1: int = 0
    seat_2: int = 0
    waiting: int = 0
    pending: int = 0
    following: int = 0
    key: int = 0


@dataclasses.dataclass(slots=True)
class Healed:
    """What one call of :meth:`Heals.heal` has put right."""

    seats: int = 0
    """Seats that were removed, because their job has ended or is gone."""
    jobs: int = 0
    """Jobs that had no seat."""
    orders: int = 0
    """Jobs that another release has enqueued with their limits in another order. Two such jobs
    could wait for each other."""
    keys: int = 0
    """Keys with room at which jobs waited, and that no worker would have looked at."""

    def __bool__(self) -> bool:
        return bool(self.seats or self.jobs or self.orders or self.keys)


class Heals(Admissions):
    """The statements that compare seats with jobs."""

    def has_limits(self) -> bool:
        """Whether any job has had a limit lately."""
        with self.read() as connection:
            return connection.scalar(sa.select(LIMIT_KEYS.c.id).limit(1)) is not None

    def heal(self, cursors: Cursors) -> Healed:
        """Compare up to a thousand seats and jobs each, and move the cursors on."""
        healed = Healed()
        for state in SeatState:
            name = f"seat_{state.value}"
            after = getattr(cursors, name)
            step = functools.partial(self._heal_seats, state=state, after=after)
            found, after = self.transaction(step)
            healed.seats += found
            setattr(cursors, name, after)
        for status in (JobStatus.WAITING, JobStatus.PENDING, JobStatus.RUNNING):
            after = getattr(cursors, status.value, 0)
            found, after = self.transaction(
                functools.partial(self._heal_jobs, status=status, after=after)
            )
            healed.jobs += found
            if status is not JobStatus.RUNNING:
                setattr(cursors, status.value, after)
        healed.orders, cursors.following = self.transaction(
            functools.partial(self._heal_orders, after=cursors.following)
        )
        healed.keys, cursors.key = self.transaction(
            functools.partial(self._heal_keys, after=cursors.key)
        )
        return healed

    def _heal_seats(
        self, connection: sa.Connection, state: SeatState, after: int
    ) -> tuple[int, int]:
        """Remove seats with a state that their jobs cannot have, because they have ended or are
        gone.

        :returns: their number, and the next cursor.
        """
        some = (
            sa.select(SEATS.c.job_id)
            .where(SEATS.c.state == state.value, SEATS.c.job_id > after)
            .order_by(SEATS.c.job_id)
            .limit(_ROWS_PER_STEP)
        )
        may_have = _MAY_HOLD if state is SeatState.HOLDS else IS_AT_LIMIT
        ids = connection.scalars(some).all()
        valid = sa.select(JOBS.c.id).where(JOBS.c.id.in_(ids), may_have)
        wrong = sorted(set(ids) - set(connection.scalars(valid))) if ids else []
        return self.remove_seats(connection, wrong, state, may_have), _next(ids)

    def _heal_jobs(
        self, connection: sa.Connection, status: JobStatus, after: int
    ) -> tuple[int, int]:
        """Give seats to jobs with limits that have none.

        :returns: their number, and the next cursor.
        """
        states = [_WAITS, _PARKED] if status is JobStatus.WAITING else [_HOLDS]
        needs_seat = IS_AT_LIMIT if status is JobStatus.WAITING else transitions.HAS_LIMITS
        some = (
            sa.select(JOBS.c.id, needs_seat.label("needs_seat"))
            .where(JOBS.c.status == status.value, JOBS.c.id > after)
            .order_by(JOBS.c.id)
        )
        rows = connection.execute(self.limit_ordered(some, _ROWS_PER_STEP)).all()
        ids = [row.id for row in rows if row.needs_seat]
        missing = self._without_seat(connection, ids, states)
        locked = self.lock_jobs(connection, missing, status)
        # The jobs may have got seats since, before their rows were locked.
        found = [locked[each] for each in self._without_seat(connection, sorted(locked), states)]
        if status is JobStatus.RUNNING:
            self.insert_seats(connection, [each for row in found for each in _held(row)])
        else:
            self.send_back(connection, found, is_parked=False)
        return len(found), _next([row.id for row in rows])

    def _without_seat(
        self, connection: sa.Connection, ids: Sequence[int], states: Sequence[int]
    ) -> list[int]:
        """The ids of the jobs among these that have no seat with one of the states."""
        if not ids:
            return []
        seated = sa.select(SEATS.c.job_id).where(SEATS.c.state.in_(states), SEATS.c.job_id.in_(ids))
        return sorted(set(ids) - set(connection.scalars(seated)))

    def _heal_orders(self, connection: sa.Connection, after: int) -> tuple[int, int]:
        """Let jobs that hold a seat and wait for another take their limits in the order of the
        present definitions.

        :returns: their number, and the next cursor.
        """
        some = (
            sa.select(SEATS.c.job_id)
            .where(SEATS.c.state == _WAITS, SEATS.c.position > 0, SEATS.c.job_id > after)
            .order_by(SEATS.c.job_id)
            .limit(_ROWS_PER_STEP)
        )
        ids = connection.scalars(some).all()
        rows = self.lock_jobs(connection, ids, JobStatus.WAITING)
        uses = {row.id: uses_from_json(row.limits) for row in rows.values()}
        names = {use.name for each in uses.values() for use in each}
        limits = sa.select(LIMITS.c.name, LIMITS.c.definition).where(LIMITS.c.name.in_(names))
        rules = {
            row.name: effective_rule(row.definition, None) for row in connection.execute(limits)
        }
        healed = 0
        for job_id, found in uses.items():
            ordered = sorted(found, key=lambda use: use.order_by(rules.get(use.name, use.rule)))
            if list(found) != ordered:
                values = {"limits": uses_to_json(ordered), "limit_key_id": ordered[0].key_id}
                connection.execute(sa.update(JOBS).where(JOBS.c.id == job_id).values(values))
                again = self.lock_jobs(connection, [job_id], JobStatus.WAITING)
                self.send_back(connection, list(again.values()), is_parked=False)
                healed += 1
        return healed, _next(ids)

    def _heal_keys(self, connection: sa.Connection, after: int) -> tuple[int, int]:
        """Insert notices for keys with room at which jobs wait without one.

        :returns: their number, and the next cursor.
        """
        some = (
            sa.select(LIMIT_KEYS.c.id)
            .where(LIMIT_KEYS.c.id > after)
            .order_by(LIMIT_KEYS.c.id)
            .limit(_KEYS_PER_STEP)
        )
        ids = connection.scalars(some).all()
        keys = self.lock_keys(connection, ids)
        # Counted before the notices are read: a job that arrives in between has a notice.
        self.count_seats(connection, keys)
        idle = [
            key.id
            for key in keys.values()
            if key.free_seats > 0 and key.best_waiting is not None and key.due_at is None
        ]
        noticed = sa.select(NOTICES.c.key_id).where(NOTICES.c.key_id.in_(idle)).distinct()
        lost = sorted(set(idle) - set(connection.scalars(noticed))) if idle else []
        self.notice(connection, dict.fromkeys(lost, ()))
        return len(lost), ids[-1] if len(ids) == _KEYS_PER_STEP else 0


def _next(ids: Sequence[int]) -> int:
    """The cursor after a step that has read these ids."""
    return ids[-1] if len(ids) == _ROWS_PER_STEP else 0


def _held(row: Any) -> list[dict[str, Any]]:
    """The seats of a running job."""
    uses = uses_from_json(row.limits)
    return [
        {
            **seat(use, n, len(uses) - 1 - n, row.id, row.claim_rank, row.run_at),
            "state": _HOLDS,
        }
        for n, use in enumerate(uses)
    ]
