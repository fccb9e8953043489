"""The keys of limits: lock their rows, read their notices, and count their seats."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from ...job.limits import LimitUse, Rule, limit_id, uses_from_json
from ...job.rates import RateState, permit, state_from, with_starts
from ...job.statuses import JobStatus
from ...models import SeatState
from .. import transitions
from ..database import JOBS, LIMIT_KEYS, LIMITS, NOTICES, SEATS
from .open_queues import OpenQueues
from .seats import by_primary_key, microseconds

_NOTICES_PER_STEP = 2_000
_DUE_PER_STEP = 500
_WAITS, _HOLDS = SeatState.WAITS.value, SeatState.HOLDS.value
ORDER = SEATS.c.claim_rank, SEATS.c.run_at, SEATS.c.job_id
"""The order in which jobs get the seats of a key."""
LIMIT_COLUMNS = (
    LIMITS.c.definition,
    LIMITS.c.override,
    LIMITS.c.paused_at.label("limit_paused_at"),
)


class Wanted(NamedTuple):
    """A key that needs a look."""

    key_id: int
    changed: int
    """Number of notices about jobs whose limits have changed."""


@dataclasses.dataclass(slots=True)
class Key:
    """A key whose row is locked."""

    id: int
    rule: Rule
    is_paused: bool
    state: RateState
    due_at: dt.datetime | None
    used_at: dt.datetime
    now: int
    """The time of the database's clock after the lock was taken, as microseconds since 1970."""
    held: int = 0
    best_waiting: int | None = None
    """The claim rank of the first job that waits; ``None``: none waits."""
    worst_held: int | None = None
    """The largest claim rank of a job with a seat."""
    in_flight: int = 0
    """Of a rate: number of jobs with a seat whose start is not known."""
    running: list[int] = dataclasses.field(default_factory=list)
    """Of a rate: the starts of running jobs, which are recorded only when they end."""
    room: int = 0
    """How many jobs may still be admitted."""
    extra: int = 0
    """How many more jobs to read than there is room for."""
    admitted: int = 0
    has_skipped: bool = False
    """Whether jobs were not admitted because their rows are locked."""

    @property
    def free_seats(self) -> float:
        """How many more jobs may hold a seat; negative if more hold one than allowed."""
        if self.is_paused:
            return -self.held
        return math.inf if self.rule.concurrency is None else self.rule.concurrency - self.held

    @property
    def wanted(self) -> int:
        """How many waiting jobs to read."""
        return self.room + self.extra

    @property
    def rate_state(self) -> RateState:
        """The state of its rate, with the starts of running jobs."""
        return with_starts(self.state, self.running, self.rule, self.now)

    def find_room(self, most: int) -> None:
        """Set how many jobs may be admitted, up to ``most``."""
        room = min(most, max(0, self.free_seats))
        if self.rule.rate is not None and room:
            room = permit(self.rate_state, self.rule, self.now, self.in_flight, int(room)).number
        self.room = int(room)


class LimitKeys(OpenQueues):
    """The statements on keys and their notices."""

    def keys_to_look_at(self, connection: sa.Connection) -> list[Wanted]:
        """The keys of the oldest notices, and those whose rate allows another start."""
        found: dict[int, int] = {}
        for row in connection.execute(self._wanted):
            found[row.key_id] = found.get(row.key_id, 0) + row.changed
        return [Wanted(key_id, found[key_id]) for key_id in sorted(found)]

    @functools.cached_property
    def _wanted(self) -> sa.CompoundSelect[Any]:
        columns = NOTICES.c.id, NOTICES.c.key_id, NOTICES.c.job_id
        oldest = sa.select(*columns).order_by(NOTICES.c.id).limit(_NOTICES_PER_STEP).subquery()
        notified = sa.select(
            oldest.c.key_id, sa.func.count(oldest.c.job_id).label("changed")
        ).group_by(oldest.c.key_id)
        due = sa.select(LIMIT_KEYS.c.id.label("key_id")).where(LIMIT_KEYS.c.due_at <= self.now)
        first = due.order_by(LIMIT_KEYS.c.due_at).limit(_DUE_PER_STEP).subquery()
        return notified.union_all(sa.select(first.c.key_id, sa.literal(0)))

    def lock_keys(self, connection: sa.Connection, ids: Sequence[int]) -> dict[int, Key]:
        """Lock the rows of keys that nobody else has locked. Rows that do not exist are inserted if
        a job waits there; otherwise their notices are deleted. Limits without a row are
        inserted as well."""
        rows = self.locked_rows(connection, ids)
        if lost := [row.id for row in rows if row.definition is None]:
            self._insert_limits_of(connection, self._uses_at(connection, lost))
            rows = self.locked_rows(connection, ids)
        if len(rows) < len(ids):
            missing = sorted(set(ids) - {row.id for row in rows})
            existing = sa.select(LIMIT_KEYS.c.id).where(LIMIT_KEYS.c.id.in_(missing))
            new = sorted(set(missing) - set(connection.scalars(existing)))
            uses = self._uses_of(connection, new)
            if uses:
                self._insert_keys(connection, uses)
                rows += self.locked_rows(connection, sorted(uses))
        return {row.id: _key(row) for row in rows}

    def unlocked_keys(self, connection: sa.Connection, ids: Sequence[int]) -> dict[int, Key]:
        """Read keys that exist, with their limits and counts, without a lock."""
        found = connection.execute(self._unlocked, {"ids": ids})
        rows = [row for row in found if row.definition is not None]
        keys = {row.id: _key(row) for row in rows}
        _note_counts(keys, rows)
        return keys

    def lock_existing_keys(self, connection: sa.Connection, ids: Sequence[int]) -> dict[int, Key]:
        """Lock the rows of keys that exist, with their limits, and that nobody else has locked."""
        rows = self.locked_rows(connection, ids)
        return {row.id: _key(row) for row in rows if row.definition is not None}

    def locked_rows(self, connection: sa.Connection, ids: Sequence[int]) -> list[Any]:
        """Lock the rows of keys, and read them with their limits and the time."""
        return list(connection.execute(self._lock, {"ids": ids})) if ids else []

    @functools.cached_property
    def _lock(self) -> sa.Select[Any]:
        ordered = self._with_limits.order_by(LIMIT_KEYS.c.id)
        return ordered.with_for_update(of=LIMIT_KEYS, skip_locked=True)

    @functools.cached_property
    def _unlocked(self) -> sa.Select[Any]:
        return self._with_limits.add_columns(*_COUNTS)

    @property
    def _with_limits(self) -> sa.Select[Any]:
        """The query for keys with their limits and the time."""
        limit = LIMITS.c.id == LIMIT_KEYS.c.limit_id
        return (
            sa.select(LIMIT_KEYS, *LIMIT_COLUMNS, self.now.label("now"))
            .join_from(LIMIT_KEYS, LIMITS, limit, isouter=True)
            .where(_IS_CHOSEN)
        )

    def _uses_of(self, connection: sa.Connection, ids: Sequence[int]) -> dict[int, LimitUse]:
        """The limits and keys of ids without a row. Notices of those that no job uses are
        deleted."""
        uses = self._uses_at(connection, ids)
        unused = [key_id for key_id in ids if key_id not in uses]
        if unused:
            self.delete_notices(connection, NOTICES.c.key_id.in_(unused))
            # A job may have come since the first query, and its notice is deleted now.
            uses |= self._uses_at(connection, unused)
            self._free_edited(connection, [key_id for key_id in unused if key_id not in uses])
        return uses

    def _free_edited(self, connection: sa.Connection, key_ids: Sequence[int]) -> None:
        """Let jobs run without limits that wait at keys which their limits do not have, because
        somebody has edited their rows."""
        waiting = sa.select(SEATS.c.job_id).where(SEATS.c.key_id.in_(key_ids))
        ids = sorted(connection.scalars(waiting)) if key_ids else []
        edited = self.lock_jobs(connection, ids, JobStatus.WAITING)
        self.leave_all(connection, sorted(edited))
        if edited:
            values = {**transitions.pending(), "limits": None, "limit_key_id": None}
            chosen = JOBS.c.id.in_(sorted(edited))
            connection.execute(sa.update(JOBS).where(chosen).values(values))

    def _uses_at(self, connection: sa.Connection, ids: Sequence[int]) -> dict[int, LimitUse]:
        """The limit and the key of each id, from a job that waits there or is to wait there."""
        if not ids:
            return {}
        some = sa.union(
            *(
                sa.select(sa.func.min(table.c.job_id).label("job_id"))
                .where(table.c.key_id.in_(ids))
                .group_by(table.c.key_id)
                for table in (SEATS, NOTICES)
            )
        ).subquery()
        jobs = sa.select(JOBS.c.limits).join_from(some, JOBS, JOBS.c.id == some.c.job_id)
        uses = (use for text in connection.scalars(jobs) for use in uses_from_json(text))
        return {use.key_id: use for use in uses if use.key_id in ids}

    def _insert_keys(self, connection: sa.Connection, uses: Mapping[int, LimitUse]) -> None:
        self._insert_limits_of(connection, uses)
        # A value and not an expression: PyMySQL would send a statement for each row.
        now = self.time_on(connection)
        rows = [
            {
                "id": key_id,
                "limit_id": limit_id(uses[key_id].name),
                "name": uses[key_id].key,
                "used_at": now,
            }
            for key_id in sorted(uses)
        ]
        connection.execute(self._key_insertion, rows)

    def _insert_limits_of(self, connection: sa.Connection, uses: Mapping[int, LimitUse]) -> None:
        by_name = {use.name: use for use in uses.values()}
        self.insert_limits(connection, {name: use.rule for name, use in sorted(by_name.items())})

    def insert_key(self, connection: sa.Connection, key_id: int, limit_id: int, name: str) -> None:
        """Insert the row of a key, unless it exists."""
        values = {"id": key_id, "limit_id": limit_id, "name": name}
        connection.execute(self._key_insertion, [{**values, "used_at": self.time_on(connection)}])

    def insert_limits(self, connection: sa.Connection, rules: Mapping[str, Rule]) -> None:
        """Insert the rows of limits, by name; rows that exist stay as they are."""
        rows = [
            {"id": limit_id(name), "name": name, "definition": json.dumps(rule.to_json())}
            for name, rule in rules.items()
        ]
        if rows:
            connection.execute(self._limit_insertion, rows)

    @functools.cached_property
    def _key_insertion(self) -> Any:
        return self.ignoring_duplicates(self.insert_into(LIMIT_KEYS), LIMIT_KEYS.c.id)

    @functools.cached_property
    def _limit_insertion(self) -> Any:
        row = self.insert_into(LIMITS).values(defined_at=self.now)
        return self.ignoring_duplicates(row, LIMITS.c.id)

    # Notices and counts

    def read_holders(self, connection: sa.Connection, keys: Iterable[Key]) -> None:
        """Read the jobs that hold seats of rates. Call this before their notices are read: a job
        that leaves in between then counts twice, and not never."""
        rated = {key.id: key for key in keys if key.rule.rate is not None}
        if not rated:
            return
        holders = (
            sa.select(SEATS.c.key_id, JOBS.c.status, JOBS.c.started_at)
            .join_from(SEATS, JOBS, JOBS.c.id == SEATS.c.job_id)
            .where(SEATS.c.key_id.in_(list(rated)), SEATS.c.state == _HOLDS)
        )
        for row in connection.execute(holders):
            key = rated[row.key_id]
            if row.status == JobStatus.RUNNING.value and row.started_at is not None:
                key.running.append(microseconds(row.started_at))
            else:
                key.in_flight += 1

    def take_starts(self, connection: sa.Connection, keys: Iterable[Key]) -> None:
        """Take the notices of rates, and record the starts that they report."""
        rated = {key.id: key for key in keys if key.rule.rate is not None}
        if not rated:
            return
        # All of them: a start that is not recorded must not be followed by another admission.
        notices = sa.select(NOTICES.c.id, NOTICES.c.key_id, NOTICES.c.starts)
        mine = NOTICES.c.key_id.in_(list(rated)), NOTICES.c.job_id.is_(None)
        rows = connection.execute(notices.where(*mine)).all()
        starts: dict[int, list[int]] = {key_id: [] for key_id in rated}
        for row in rows:
            now = rated[row.key_id].now
            starts[row.key_id] += (now if t is None else t for t in _starts_of(row.starts))
        for key in rated.values():
            key.state = with_starts(key.state, starts[key.id], key.rule, key.now)
        self.delete_notices_by_id(connection, [row.id for row in rows])

    def take_notices(self, connection: sa.Connection, keys: Iterable[Key]) -> None:
        """Delete the notices of other keys. Call this before their seats are counted, or a job that
        comes in between would be forgotten."""
        ids = [key.id for key in keys if key.rule.rate is None]
        if ids:
            self.delete_notices(connection, NOTICES.c.key_id.in_(ids), NOTICES.c.job_id.is_(None))

    def count_seats(self, connection: sa.Connection, keys: Mapping[int, Key]) -> None:
        """Count the seats of locked keys, in a query that begins after the locks were taken."""
        if not keys:
            return
        _note_counts(keys, connection.execute(_COUNT_SEATS, {"ids": list(keys)}))


def _seats_at_key(state: int, *columns: Any) -> sa.Select[Any]:
    """The query for the seats with a state at the key of an outer query."""
    mine = SEATS.c.key_id == LIMIT_KEYS.c.id, SEATS.c.state == sa.literal_column(str(state))
    return by_primary_key(sa.select(*columns).where(*mine))


_BEST = _seats_at_key(_WAITS, SEATS.c.claim_rank).order_by(*ORDER).limit(1)
_COUNTS = (
    _seats_at_key(_HOLDS, sa.func.count(SEATS.c.job_id)).scalar_subquery().label("held"),
    _BEST.scalar_subquery().label("best"),
    _seats_at_key(_HOLDS, sa.func.max(SEATS.c.claim_rank)).scalar_subquery().label("worst"),
)
"""Columns that tell about the seats of a key."""
_IS_CHOSEN = LIMIT_KEYS.c.id.in_(sa.bindparam("ids", expanding=True))
_COUNT_SEATS = sa.select(LIMIT_KEYS.c.id, *_COUNTS).where(_IS_CHOSEN)


def _note_counts(keys: Mapping[int, Key], rows: Iterable[Any]) -> None:
    for row in rows:
        key = keys[row.id]
        key.held, key.best_waiting, key.worst_held = row.held, row.best, row.worst


def _key(row: Any) -> Key:
    return Key(
        id=row.id,
        rule=effective_rule(row.definition, row.override),
        is_paused=row.paused_at is not None or row.limit_paused_at is not None,
        state=state_from(row.arrival, row.starts),
        due_at=row.due_at,
        used_at=row.used_at,
        now=microseconds(row.now),
    )


def effective_rule(definition: str | None, override: str | None) -> Rule:
    """The rule of a limit, with its override if it has one. A row that is missing or cannot be read
    allows one job at a time."""
    try:
        return Rule(**{**json.loads(definition or ""), **json.loads(override or "{}")})
    except (ValueError, TypeError, RecursionError):
        return Rule(concurrency=1)


def _starts_of(text: str | None) -> Iterable[int | None]:
    """The starts in a notice; none if somebody has edited its text."""
    try:
        times = json.loads(text or "[]")
        return [time for time in times if time is None or isinstance(time, int)]
    except (ValueError, TypeError, RecursionError):
        return []
