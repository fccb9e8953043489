"""Limits: store their definitions, override them, and pause them or one of their keys."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from ...job.limits import Rule, key_id, limit_id
from ...job.rates import RateState, state_from, with_starts
from ...models import LimitRow, SeatState
from ..database import JOBS, LIMIT_KEYS, LIMITS, NOTICES, SEATS
from .audit import Actor, Audits
from .heal import Heals
from .limit_keys import ORDER, effective_rule
from .seats import by_primary_key, microseconds

MAX_COUNTED = 1_000
"""How far the waiting jobs of a key are counted."""
_UNUSED_SECONDS = 86_400.0
"""How long the row of a key that no job uses is kept."""


@dataclasses.dataclass(frozen=True, slots=True)
class KeyRow:
    """A key of a limit, and how many jobs hold its seats and wait for them."""

    id: int
    limit_id: int
    name: str
    """Empty if the limit has no keys."""
    held: int
    """Number of jobs that are pending or running, or wait at another of their limits."""
    waiting: int
    """Number of jobs that wait, counted up to 1,001."""
    parked: int
    """Number of jobs whose queue is paused or has no worker, counted up to 1,001."""
    next_in: float | None
    """Of a rate: seconds until the next start is allowed; ``None`` if no job waits for that."""
    state: RateState
    """Of a rate: the recorded starts; those of running jobs are not among them."""
    paused_at: dt.datetime | None
    paused_by: str | None


class LimitRows(Heals, Audits):
    """The statements on the rows of limits and keys."""

    def define_limits(self, rules: Mapping[str, Rule]) -> None:
        """Store the definitions of limits, by name. They replace those of other workers."""
        self.transaction(lambda c: self._define_limits(c, rules))

    def _define_limits(self, connection: sa.Connection, rules: Mapping[str, Rule]) -> None:
        ids = {limit_id(name): name for name in rules}
        known = sa.select(LIMITS.c.id, LIMITS.c.definition).where(LIMITS.c.id.in_(sorted(ids)))
        stored = {row.id: row.definition for row in connection.execute(known)}
        texts = {id_: json.dumps(rules[name].to_json()) for id_, name in ids.items()}
        self.insert_limits(connection, {n: rules[n] for i, n in ids.items() if i not in stored})
        for changed in sorted(id_ for id_ in stored if stored[id_] != texts[id_]):
            values = {"definition": texts[changed], "defined_at": self.now}
            connection.execute(sa.update(LIMITS).where(LIMITS.c.id == changed).values(values))
            self._notice_limit(connection, changed)

    def read_limits(self) -> tuple[dt.datetime, list[LimitRow]]:
        """The time of the database's clock, and the rows of all limits by name."""
        statement = sa.select(LIMITS, self.now.label("now")).order_by(LIMITS.c.name)
        with self.read() as connection:
            rows = connection.execute(statement).mappings().all()
            now = rows[0]["now"] if rows else self.time_on(connection)
        return now, [_limit_row(row) for row in rows]

    def change_limit(
        self,
        name: str,
        rule: Rule,
        values_of: Callable[[LimitRow], Mapping[str, Any]],
        by: Actor | None,
        action: str,
    ) -> bool:
        """Change the row of a limit, which is locked meanwhile.

        :param rule: the definition, if the limit has no row yet.
        :param values_of: returns the values to change in a row; empty: nothing.
        :returns: whether anything was changed.
        """

        def work(connection: sa.Connection) -> bool:
            self.insert_limits(connection, {name: rule})
            mine = sa.select(LIMITS).where(LIMITS.c.id == limit_id(name))
            row = connection.execute(mine.with_for_update()).mappings().one()
            values = values_of(_limit_row(row))
            if not values:
                return False
            update = sa.update(LIMITS).where(LIMITS.c.id == limit_id(name))
            connection.execute(update.values(**self._with_now(values)))
            self._notice_limit(connection, limit_id(name))
            self.audit(connection, by, action, subject=name)
            return True

        return self.transaction(work)

    def pause_key(self, name: str, rule: Rule, key: str, by: Actor | None, *, pause: bool) -> bool:
        """Pause one key of a limit, or resume it.

        :param rule: the definition, if the limit has no row yet.
        :returns: whether anything was changed.
        """
        is_paused = LIMIT_KEYS.c.paused_at.is_not(None)
        mine = LIMIT_KEYS.c.id == key_id(name, key)
        who = None if by is None else by.name[:255]
        values: dict[str, Any] = {"paused_at": None, "paused_by": None}
        if pause:
            values = {"paused_at": self.now, "paused_by": who}

        def work(connection: sa.Connection) -> bool:
            self.insert_limits(connection, {name: rule})
            self.insert_key(connection, key_id(name, key), limit_id(name), key)
            update = sa.update(LIMIT_KEYS).where(mine, ~is_paused if pause else is_paused)
            if not connection.execute(update.values(**values)).rowcount:
                return False
            self.notice(connection, {key_id(name, key): ()})
            self.notify(connection)
            action = "pause limit" if pause else "resume limit"
            self.audit(connection, by, action, subject=f"{name} [{key}]")
            return True

        return self.transaction(work)

    def _with_now(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values, with the database's clock in place of ``...``."""
        return {name: self.now if value is ... else value for name, value in values.items()}

    def _notice_limit(self, connection: sa.Connection, id_: int) -> None:
        """Insert a notice for each key of a limit, because its numbers have changed."""
        keys: sa.Select[Any] = sa.select(LIMIT_KEYS.c.id).where(LIMIT_KEYS.c.limit_id == id_)
        connection.execute(sa.insert(NOTICES).from_select(["key_id"], keys))
        self.notify(connection)

    def read_keys(
        self, number: int, *, name: str | None = None, key: str | None = None
    ) -> list[KeyRow]:
        """The keys at which jobs wait or that are paused, by limit and name; then the others with
        seats.

        :param number: how many at most.
        :param name: only those of this limit.
        :param key: only this key of the limit.
        """
        waits = self._has_seat(SeatState.WAITS, SeatState.PARKED)
        first = sa.or_(waits, LIMIT_KEYS.c.paused_at.is_not(None))
        mine = sa.true() if name is None else LIMIT_KEYS.c.limit_id == limit_id(name)
        if name is not None and key is not None:
            mine, first = LIMIT_KEYS.c.id == key_id(name, key), sa.true()
        order = LIMIT_KEYS.c.limit_id, LIMIT_KEYS.c.name
        busy = sa.select(LIMIT_KEYS).where(mine, first).order_by(*order)
        held = sa.select(LIMIT_KEYS).where(mine, ~first, self._has_seat(SeatState.HOLDS))
        with self.read() as connection:
            now = self.time_on(connection)
            rows = list(connection.execute(busy.limit(number)))
            if len(rows) < number and key is None:
                others = held.order_by(*order).limit(number - len(rows))
                rows += connection.execute(others)
            counts = self._capped_counts(connection, [row.id for row in rows])
        return [_key_row(row, counts, now) for row in rows]

    def _has_seat(self, *states: SeatState) -> sa.ColumnElement[bool]:
        values = [state.value for state in states]
        return sa.exists().where(SEATS.c.key_id == LIMIT_KEYS.c.id, SEATS.c.state.in_(values))

    def _capped_counts(
        self, connection: sa.Connection, ids: Sequence[int]
    ) -> dict[tuple[int, int], int]:
        """The number of seats by key and state, each counted up to 1,001."""
        counts = []
        for each in ids:
            for state in SeatState:
                mine = SEATS.c.key_id == each, SEATS.c.state == state.value
                some = by_primary_key(sa.select(SEATS.c.job_id).where(*mine))
                capped = some.limit(MAX_COUNTED + 1).subquery()
                number = sa.select(sa.func.count()).select_from(capped).scalar_subquery()
                counts.append(sa.select(sa.literal(each), sa.literal(state.value), number))
        if not counts:
            return {}
        rows = connection.execute(sa.union_all(*counts))
        return {(row[0], row[1]): row[2] for row in rows}

    def holders(self, key: int, number: int) -> list[Any]:
        """The jobs with a seat of a key, those that started first: id, status and start."""
        held = (
            sa.select(JOBS.c.id, JOBS.c.status, JOBS.c.started_at, JOBS.c.claimed_at)
            .join_from(SEATS, JOBS, JOBS.c.id == SEATS.c.job_id)
            .where(SEATS.c.key_id == key, SEATS.c.state == SeatState.HOLDS.value)
            .order_by(JOBS.c.claimed_at, JOBS.c.id)
        )
        with self.read() as connection:
            return list(connection.execute(held.limit(number)))

    def seat_of(self, job_id: int) -> tuple[Any, int] | None:
        """The key at which a job waits, with its limit, and the number of jobs ahead of it there,
        counted up to 1,001; ``None`` if it waits at none."""
        with self.read() as connection:
            keys = sa.select(
                SEATS.c.claim_rank,
                SEATS.c.run_at,
                LIMIT_KEYS,
                LIMITS.c.name.label("limit_name"),
                LIMITS.c.definition,
                LIMITS.c.override,
                LIMITS.c.paused_at.label("limit_paused_at"),
                LIMITS.c.paused_by.label("limit_paused_by"),
                self.now.label("now"),
            ).join_from(SEATS, LIMIT_KEYS, LIMIT_KEYS.c.id == SEATS.c.key_id)
            keys = keys.join(LIMITS, LIMITS.c.id == LIMIT_KEYS.c.limit_id)
            mine = SEATS.c.state == SeatState.WAITS.value, SEATS.c.job_id == job_id
            key = connection.execute(keys.where(*mine)).first()
            if key is None:
                return None
            order = sa.tuple_(*ORDER)
            better = sa.select(SEATS.c.job_id).where(
                SEATS.c.key_id == key.id,
                SEATS.c.state == SeatState.WAITS.value,
                order < sa.tuple_(key.claim_rank, key.run_at, job_id),
            )
            capped = by_primary_key(better).limit(MAX_COUNTED + 1).subquery()
            ahead = connection.scalar(sa.select(sa.func.count()).select_from(capped))
        return key, ahead or 0

    def prune_limit_keys(self, limit: int) -> int:
        """Delete up to ``limit`` rows of keys that no job has used for a day.

        :returns: the number of deleted rows.
        """
        unused = (
            LIMIT_KEYS.c.used_at < self.after(sa.literal(-_UNUSED_SECONDS)),
            LIMIT_KEYS.c.paused_at.is_(None),
            LIMIT_KEYS.c.due_at.is_(None),
            ~sa.exists().where(SEATS.c.key_id == LIMIT_KEYS.c.id),
            ~sa.exists().where(NOTICES.c.key_id == LIMIT_KEYS.c.id),
        )

        chosen = sa.select(LIMIT_KEYS, LIMITS.c.definition, LIMITS.c.override).join_from(
            LIMIT_KEYS, LIMITS, LIMITS.c.id == LIMIT_KEYS.c.limit_id, isouter=True
        )

        def work(connection: sa.Connection) -> int:
            now = microseconds(self.time_on(connection))
            rows = connection.execute(chosen.where(*unused).limit(limit)).all()
            ids = sorted(row.id for row in rows if not _counts_starts(row, now))
            if ids:
                connection.execute(sa.delete(LIMIT_KEYS).where(LIMIT_KEYS.c.id.in_(ids)))
            return len(ids)

        return self.transaction(work)

    def prune_limits(self, limit: int, kept: Collection[str]) -> int:
        """Delete up to ``limit`` rows of limits that were defined more than a day ago and have no
        key, unless they are in the code, or somebody has overridden or paused them.

        :param kept: the names of the limits in the code.
        :returns: the number of deleted rows.
        """
        unused = (
            LIMITS.c.name.not_in(kept),
            LIMITS.c.defined_at < self.after(sa.literal(-_UNUSED_SECONDS)),
            LIMITS.c.override.is_(None),
            LIMITS.c.paused_at.is_(None),
            ~sa.exists().where(LIMIT_KEYS.c.limit_id == LIMITS.c.id),
        )

        def work(connection: sa.Connection) -> int:
            some = sa.select(LIMITS.c.id).where(*unused).limit(limit)
            ids = sorted(connection.scalars(some))
            # If a key is inserted meanwhile, the next look at it inserts its limit again.
            if ids:
                connection.execute(sa.delete(LIMITS).where(LIMITS.c.id.in_(ids)))
            return len(ids)

        return self.transaction(work)


def _counts_starts(row: Any, now: int) -> bool:
    """Whether a rate still counts starts of a key."""
    rule = effective_rule(row.definition, row.override)
    if rule.rate is None:
        return False
    return bool(with_starts(state_from(row.arrival, row.starts), (), rule, now).starts)


def _limit_row(row: Any) -> LimitRow:
    return LimitRow(**{column.name: row[column.name] for column in LIMITS.c})


def _key_row(row: Any, counts: Mapping[tuple[int, int], int], now: dt.datetime) -> KeyRow:
    def number(state: SeatState) -> int:
        return counts.get((row.id, state.value), 0)

    return KeyRow(
        id=row.id,
        limit_id=row.limit_id,
        name=row.name,
        held=number(SeatState.HOLDS),
        waiting=number(SeatState.WAITS),
        parked=number(SeatState.PARKED),
        next_in=None if row.due_at is None else (row.due_at - now).total_seconds(),
        state=state_from(row.arrival, row.starts),
        paused_at=row.paused_at,
        paused_by=row.paused_by,
    )
