"""Admit: let jobs run that wait for their limits, where there is room.

A worker reads which keys have notices, locks the rows of these keys, deletes the notices, and then
counts the seats that are held. The order matters. A query that begins after the lock was taken sees
what the last worker with the lock has done, and one that begins after the notices were deleted sees
what they announced.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from ...job.limits import uses_from_json
from ...job.rates import SECOND, given_back, permit, starts_to_json
from ...job.statuses import NOT_STARTED, JobStatus, WaitsFor
from ...models import SeatState
from .. import transitions
from ..database import JOBS, LIMIT_KEYS, NOTICES, SEATS
from .limit_keys import ORDER, Key, LimitKeys, Wanted
from .seats import (
    ALL_QUEUES,
    by_primary_key,
    by_state_and_job,
    microseconds,
    seat,
    time_of,
)

_KEYS_PER_STEP = 500
"""Keys that one transaction works on."""
_ROOM_PER_STEP = 1_000
"""Jobs that one transaction admits for one key."""
_SWAPS_PER_STEP = 100
_FURTHER = 10
"""How many more jobs are read at a key if the rows of the first ones are locked."""
_PASSES, _PARKED_MORE = 4, 8
"""How often a transaction looks for more jobs of a key because it has parked some, and how many
times as many it then reads."""
_LOOK_AGAIN = SECOND // 4
"""When to look again at a rate whose room is taken by jobs that have not started."""
_USED = 3_600 * SECOND
"""How exact the time of the last use of a key is."""
_WAITS, _HOLDS = SeatState.WAITS.value, SeatState.HOLDS.value


class Admitted(NamedTuple):
    """The result of one step."""

    jobs: int
    """Number of jobs that became pending."""
    more: bool
    """Whether there is more to do at once."""


class Candidate(NamedTuple):
    """A waiting job that is among the first at a key. Its row is locked."""

    key_id: int
    job_id: int
    position: int
    further: int
    queue: str
    limits: str
    limit_key_id: int
    claim_rank: int
    run_at: Any

    @property
    def id(self) -> int:
        """The id of the job."""
        return self.job_id


CANDIDATE_COLUMNS = (
    *(SEATS.c.key_id, SEATS.c.job_id, SEATS.c.position, SEATS.c.further),
    *(JOBS.c.queue, JOBS.c.limits, JOBS.c.limit_key_id, JOBS.c.claim_rank, JOBS.c.run_at),
)


def is_waiting_job(job_id: sa.ColumnElement[int]) -> sa.ColumnElement[bool]:
    """The condition that the job with this id waits."""
    is_waiting = JOBS.c.status == JobStatus.WAITING.value
    # CASE hides the status from planners, which could otherwise begin with all waiting jobs.
    return sa.and_(JOBS.c.id == job_id, sa.case((is_waiting, sa.true()), else_=sa.false()))


IS_AT_LIMIT = sa.and_(
    JOBS.c.status == JobStatus.WAITING.value,
    JOBS.c.waits_for.in_([WaitsFor.LIMIT.value, WaitsFor.QUEUE.value]),
)
"""The condition that a job waits for its limits."""
IS_WAITING_JOB = is_waiting_job(SEATS.c.job_id)


class Admissions(LimitKeys):
    """The statements that give seats to waiting jobs."""

    def admit(self) -> Admitted:
        """Look at the keys with the oldest notices, and let jobs run where the limits allow it.

        Keys whose rows another worker has locked are left to a later call.
        """
        return self.transaction(self._admit)

    def _admit(self, connection: sa.Connection) -> Admitted:
        wanted = self.keys_to_look_at(connection)
        if not wanted:
            return Admitted(0, more=False)
        if wanted[0].key_id == ALL_QUEUES:
            # This leaves notices for the keys of the jobs that it changes.
            self.take_queue_notices(connection)
            return Admitted(0, more=True)
        keys = self.lock_keys(connection, [each.key_id for each in wanted[:_KEYS_PER_STEP]])
        has_changed = self._take_changes(connection, [w for w in wanted if w.key_id in keys])
        self.read_holders(connection, keys.values())
        self.take_starts(connection, keys.values())
        self.take_notices(connection, keys.values())
        admitted, more = self.admit_at(connection, keys)
        return Admitted(admitted, has_changed or more or len(wanted) > _KEYS_PER_STEP)

    def admit_at(self, connection: sa.Connection, keys: Mapping[int, Key]) -> Admitted:
        """Admit jobs that wait at locked keys. Those with a rate have read their starts."""
        if not keys:
            return Admitted(0, more=False)
        self.count_seats(connection, keys)
        self._withdraw(connection, keys)
        for key in keys.values():
            key.find_room(_ROOM_PER_STEP)
        admitted, has_followers = self.fill(connection, keys)
        self._save(connection, keys)
        is_full_step = any(key.admitted >= _ROOM_PER_STEP for key in keys.values())
        return Admitted(len(admitted), has_followers or is_full_step)

    def _take_changes(self, connection: sa.Connection, wanted: Sequence[Wanted]) -> bool:
        """Give jobs whose limits have changed the seats that they need now. The notices of those
        whose rows are locked stay.

        :returns: whether there were any.
        """
        keys = [each.key_id for each in wanted if each.changed]
        if not keys:
            return False
        notices = sa.select(NOTICES.c.id, NOTICES.c.job_id)
        mine = NOTICES.c.key_id.in_(keys), NOTICES.c.job_id.is_not(None)
        changes = connection.execute(notices.where(*mine)).all()
        ids = sorted({row.job_id for row in changes})
        rows = self.lock_jobs(connection, ids, *NOT_STARTED)
        ready = [row for row in rows.values() if _is_ready(row)]
        self.send_back(connection, ready, is_parked=False)
        self.leave_all(connection, sorted(set(rows) - {row.id for row in ready}))
        statuses = [status.value for status in NOT_STARTED]
        others = sa.select(JOBS.c.id).where(JOBS.c.id.in_(ids), JOBS.c.status.in_(statuses))
        locked = set(connection.scalars(others)) - set(rows)
        done = [row.id for row in changes if row.job_id not in locked]
        self.delete_notices_by_id(connection, done)
        return bool(rows)

    # Admissions

    def fill(
        self, connection: sa.Connection, keys: Mapping[int, Key]
    ) -> tuple[dict[int, int], bool]:
        """Admit the first waiting jobs of keys, as many as each has room for.

        :returns: the keys of the jobs that are pending now, by the ids of the jobs; and whether
            there is more to do, because others now wait at their next limit, or were parked.
        """
        open_keys = [k for k in keys.values() if k.room > 0 and k.best_waiting is not None]
        pending: dict[int, int] = {}
        following = 0
        for number in range(_PASSES):
            if not open_keys:
                break
            found = self.first_waiting(connection, open_keys)
            served = self.open_queues(connection)
            if any(each.queue not in served for each in found):
                # Read anew: a worker may have started since.
                served = self.open_queues(connection, max_age=0.0)
            closed = [each for each in found if each.queue not in served]
            fit = _within_room(keys, [each for each in found if each.queue in served])
            self.send_back(connection, closed, is_parked=True)
            given, waiting = self._give_seats(connection, fit)
            following += len(waiting)
            for candidate in fit:
                key = keys[candidate.key_id]
                if candidate.id not in given:
                    key.has_skipped = True
                    continue
                key.room -= 1
                key.admitted += 1
                if candidate.id not in waiting:
                    pending[candidate.id] = key.id
            open_keys = [keys[key_id] for key_id in {each.key_id for each in closed}]
            for key in open_keys:
                key.extra = _PARKED_MORE ** (number + 1)
        self.notice(connection, {key.id: () for key in keys.values() if key.has_skipped})
        return pending, following > 0 or bool(open_keys)

    def first_waiting(self, connection: sa.Connection, keys: Sequence[Key]) -> list[Candidate]:
        """The first jobs that wait at each key, as many as it has room for. Their rows are locked;
        those that another transaction has locked are left out, and noted in the key."""
        found: list[Candidate] = []
        one = {key.id for key in keys if key.wanted == 1}
        if one:
            rows = list(connection.execute(self._first_of_each, {"ids": sorted(one)}))
            if missing := sorted(one - {row.key_id for row in rows}):
                self._remove_stale(connection, missing)
                rows += connection.execute(self._first_of_each, {"ids": missing}).all()
            found += map(Candidate._make, rows)
        for key in keys:
            if key.wanted > 1:
                parameters = {"key": key.id, "number": key.wanted}
                found += map(Candidate._make, connection.execute(self._first_of_key, parameters))
        return found

    def next_free(
        self, connection: sa.Connection, key: Key, number: int, known: Collection[int]
    ) -> list[Candidate]:
        """Up to ``number`` jobs that wait at a key behind others that are locked. The key needs
        another look later."""
        key.has_skipped = True
        parameters = {"key": key.id, "number": key.wanted + number + _FURTHER}
        rows = map(Candidate._make, connection.execute(self._first_of_key, parameters))
        others = [each for each in rows if each.id not in known]
        locked = self.lock_jobs(connection, [each.id for each in others], JobStatus.WAITING)
        free = [each for each in others if each.id in locked]
        return self.still_waiting(connection, free)[:number]

    def still_waiting(self, connection: sa.Connection, locked: list[Candidate]) -> list[Candidate]:
        """Those of the jobs that still wait at their keys. Before their rows were locked, another
        transaction may have given them their seats, after which they wait at their next limits."""
        # SQLite has one writer, and PostgreSQL checks it when it gives the seats.
        return locked

    def _remove_stale(self, connection: sa.Connection, key_ids: Sequence[int]) -> None:
        """Remove seats of jobs that do not wait, as after an edit by hand."""
        stale = (
            sa.select(SEATS.c.job_id)
            .join_from(SEATS, JOBS, IS_WAITING_JOB, isouter=True)
            .where(SEATS.c.key_id.in_(key_ids), SEATS.c.state == _WAITS, JOBS.c.id.is_(None))
            .limit(_ROOM_PER_STEP)
        )
        ids = sorted(connection.scalars(stale))
        self.remove_seats(connection, ids, SeatState.WAITS, IS_AT_LIMIT)

    @functools.cached_property
    def _first_of_key(self) -> sa.Select[Any]:
        waiting = sa.select(*CANDIDATE_COLUMNS).join_from(SEATS, JOBS, IS_WAITING_JOB)
        mine = SEATS.c.key_id == sa.bindparam("key", type_=sa.BigInteger), SEATS.c.state == _WAITS
        number = sa.bindparam("number", type_=sa.Integer)
        ordered = by_primary_key(waiting.where(*mine)).order_by(*ORDER)
        return self.limit_ordered(ordered, number)

    @functools.cached_property
    def _first_of_each(self) -> sa.Select[Any]:
        first = first_job_of(LIMIT_KEYS.c.id).scalar_subquery()
        firsts = (
            sa.select(LIMIT_KEYS.c.id.label("key_id"), first.label("job_id"))
            .where(LIMIT_KEYS.c.id.in_(sa.bindparam("ids", expanding=True)))
            .subquery()
        )
        is_first = sa.and_(
            SEATS.c.state == _WAITS,
            SEATS.c.job_id == firsts.c.job_id,
            SEATS.c.key_id == firsts.c.key_id,
        )
        found = sa.select(*CANDIDATE_COLUMNS).join_from(firsts, SEATS, is_first)
        return found.join(JOBS, IS_WAITING_JOB)

    def _give_seats(
        self, connection: sa.Connection, candidates: Sequence[Candidate]
    ) -> tuple[set[int], set[int]]:
        """Let jobs hold the seats at which they wait.

        :returns: the ids of those that hold their seats now, and of those among them that wait at
            their next limit.
        """
        if not candidates:
            return set(), set()
        following = []
        for each in candidates:
            uses = uses_from_json(each.limits)[each.position + 1 :] if each.further else ()
            if uses:
                place = (each.position + 1, len(uses) - 1)
                following.append(seat(uses[0], *place, each.id, each.claim_rank, each.run_at))
        waiting = {values["job_id"] for values in following}
        given = self.give(connection, candidates, waiting)
        following = [values for values in following if values["job_id"] in given]
        self.insert_seats(connection, following)
        return given, waiting & given

    def give(
        self, connection: sa.Connection, candidates: Sequence[Candidate], waiting: Collection[int]
    ) -> set[int]:
        """Let jobs hold the seats at which they wait, and make them pending.

        :param waiting: the ids of those that wait at their next limit instead.
        :returns: the ids of the jobs that hold their seats now.
        """
        ids = [each.id for each in candidates]
        connection.execute(self.seats_update, {"ids": ids})
        self.make_pending(connection, [job_id for job_id in ids if job_id not in waiting])
        return set(ids)

    def make_pending(self, connection: sa.Connection, ids: Sequence[int]) -> None:
        """Make waiting jobs pending."""
        if ids:
            connection.execute(self.pending_update, {"ids": ids})

    @functools.cached_property
    def seats_update(self) -> sa.Update:
        """The statement that makes waiting jobs hold a seat."""
        ids = sa.bindparam("ids", expanding=True, type_=sa.BigInteger)
        mine = SEATS.c.state == sa.literal_column(str(_WAITS)), SEATS.c.job_id.in_(ids)
        return by_state_and_job(sa.update(SEATS).where(*mine)).values(state=_HOLDS)

    @functools.cached_property
    def pending_update(self) -> sa.Update:
        """The statement that makes waiting jobs pending."""
        ids = sa.bindparam("ids", expanding=True, type_=sa.BigInteger)
        return sa.update(JOBS).where(JOBS.c.id.in_(ids)).values(transitions.pending())

    # Withdrawals

    def _withdraw(self, connection: sa.Connection, keys: Mapping[int, Key]) -> None:
        """Take seats from pending jobs where more are held than allowed, or where a job with a
        higher priority waits."""
        for key in keys.values():
            ids: list[int] = []
            if key.free_seats < 0:
                worst = self._worst_pending(connection, key, round(-key.free_seats))
                ids = [row.job_id for row in worst]
            elif may_swap(key):
                ids = self._to_swap(connection, key)
            rows = self.lock_jobs(connection, ids, JobStatus.PENDING)
            self.send_back(connection, list(rows.values()), is_parked=False)
            key.held -= len(rows)
            if key.rule.rate is not None and rows:
                key.in_flight -= len(rows)
                key.state = given_back(key.state, key.rule, len(rows))
            ranks = [row.claim_rank for row in rows.values()]
            if key.best_waiting is not None:
                ranks.append(key.best_waiting)
            key.best_waiting = min(ranks, default=None)

    def _worst_pending(self, connection: sa.Connection, key: Key, number: int) -> Sequence[Any]:
        """The pending jobs with a seat, those with the lowest priority first."""
        worst = (
            sa.select(SEATS.c.job_id, SEATS.c.claim_rank)
            .join_from(SEATS, JOBS, JOBS.c.id == SEATS.c.job_id)
            .where(
                SEATS.c.key_id == key.id,
                SEATS.c.state == _HOLDS,
                JOBS.c.status == JobStatus.PENDING.value,
            )
            .order_by(*(column.desc() for column in ORDER))
        )
        return connection.execute(by_primary_key(worst).limit(number)).all()

    def _to_swap(self, connection: sa.Connection, key: Key) -> list[int]:
        """The ids of pending jobs whose seats better jobs shall have."""
        held = self._worst_pending(connection, key, _SWAPS_PER_STEP)
        best = (
            sa.select(SEATS.c.claim_rank)
            .where(SEATS.c.key_id == key.id, SEATS.c.state == _WAITS)
            .order_by(*ORDER)
            .offset(_free_for_waiting(key))
            .limit(len(held))
        )
        best = by_primary_key(best)
        waiting = connection.scalars(best).all() if held else []
        pairs = zip(waiting, held, strict=False)
        return [holder.job_id for rank, holder in pairs if rank < holder.claim_rank]

    # The end of the step

    def _save(self, connection: sa.Connection, keys: Mapping[int, Key]) -> None:
        """Store the states of rates, and the times of use."""
        rows = [_stored(key) for key in keys.values() if _has_changed(key)]
        if rows:
            update = sa.update(LIMIT_KEYS).where(LIMIT_KEYS.c.id == sa.bindparam("locked"))
            connection.execute(update, rows)


def first_job_of(key_id: sa.ColumnElement[int]) -> sa.Select[Any]:
    """The query for the first waiting job at the key of an outer query."""
    other = SEATS.alias()
    waiting = sa.select(other.c.job_id).where(other.c.key_id == key_id, other.c.state == _WAITS)
    ordered = by_primary_key(waiting, other)
    return ordered.order_by(other.c.claim_rank, other.c.run_at, other.c.job_id).limit(1)


def _within_room(keys: Mapping[int, Key], found: Iterable[Candidate]) -> list[Candidate]:
    """The first of the jobs at each key, as many as it has room for."""
    taken: collections.Counter[int] = collections.Counter()
    chosen = []
    for each in found:
        if taken[each.key_id] < keys[each.key_id].room:
            taken[each.key_id] += 1
            chosen.append(each)
    return chosen


def _is_ready(row: Any) -> bool:
    """Whether a job that has not started is due and waits for nothing but its limits."""
    is_due = row.status != JobStatus.SCHEDULED.value
    return bool(is_due and row.waits_for != WaitsFor.CODE.value)


def may_swap(key: Key) -> bool:
    """Whether a job that waits may be better than one with a seat."""
    is_limited = key.rule.concurrency is not None or key.rule.rate is not None
    best, worst = key.best_waiting, key.worst_held
    if key.is_paused or not is_limited or best is None or worst is None:
        return False
    return best < worst


def is_use_old(key: Key) -> bool:
    """Whether the recorded time of the last use is too old for a key that is used now."""
    return key.now - microseconds(key.used_at) > _USED


def _free_for_waiting(key: Key) -> int:
    """How many of the first waiting jobs need no seat of another."""
    return 0 if key.rule.rate is not None else int(max(0, key.free_seats))


def _has_changed(key: Key) -> bool:
    """Whether the row of a key has to be written."""
    is_used = key.admitted > 0 and is_use_old(key)
    return key.rule.rate is not None or key.due_at is not None or is_used


def _stored(key: Key) -> dict[str, Any]:
    """The values of the row of a key."""
    next_at = None
    arrival = key.state.arrival
    if key.rule.rate is not None:
        allowed = permit(key.rate_state, key.rule, key.now, key.in_flight, key.admitted)
        arrival = allowed.state.arrival
        is_open = not key.is_paused and key.free_seats > key.admitted
        if is_open and key.best_waiting is not None:
            next_at = key.now + _LOOK_AGAIN if allowed.next_at is None else allowed.next_at
            next_at = max(next_at, key.now + 1)
    return {
        "locked": key.id,
        "arrival": arrival,
        "starts": starts_to_json(key.state),
        "due_at": None if next_at is None else time_of(next_at),
        "used_at": time_of(key.now) if key.admitted else key.used_at,
    }
