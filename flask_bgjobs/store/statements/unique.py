"""Unique jobs: insert a job, or find, replace or move the job that holds its key."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from ...errors import UniqueKeyTaken
from ...job.statuses import NOT_STARTED, JobStatus
from ...models import Job
from .. import transitions
from ..database import JOBS
from .enqueue import (
    NewJobs,
    RowInserts,
    Unique,
    chosen,
    column_values,
    loaded_job,
    unique_hash,
    with_key,
)

_TRIES = 10
_LOCK_SECONDS = 5.0
"""How long a statement waits for the transaction of another enqueue with the same unique key. The
enqueue then fails if it has joined a transaction; otherwise its own is redone."""
_HAS_NOT_STARTED = sa.and_(
    JOBS.c.status.in_([status.value for status in NOT_STARTED]), JOBS.c.attempt == 0
)
"""The condition that no worker has claimed a job. A job that is retried or was snoozed has the same
statuses."""
_UNFINISHED = frozenset(status for status in JobStatus if not status.is_final)
_THROTTLE_SLOTS = "first", "second"
"""The windows of a throttle alternate between two hashes: the job of the next window is inserted
while that of the current one still holds its own."""


_REPLACED = frozenset(
    {
        *("target", "method", "parameters", "meta", "tags", "owner", "queue", "priority"),
        *("claim_rank", "retries", "retry_delay", "backoff", "max_retry_delay", "jitter"),
        *("timeout", "failure_rules", "deadline_at", "retention_seconds", "status"),
        *("waits_for", "limits", "limit_key_id", "fair_key"),
    }
)
"""The columns that an enqueue replaces in a job that has not started. Those about attempts stay,
because the number of the attempt must never decrease."""


class Inserts(RowInserts):
    """The statements that insert jobs, unique or not."""

    _holders = sa.select(JOBS)
    """The query for the holder of a key; it must see what the newest transaction committed."""

    def insert(self, connection: sa.Connection, jobs: NewJobs) -> list[Job]:
        """Insert jobs.

        :param connection: of the transaction that the jobs join.
        :returns: one job for each of ``jobs``, in order. If another job holds the key of a unique
            job, it is that one, with ``deduplicated`` set.
        :raises UniqueKeyTaken: when a key is taken, if the jobs ask for that, or when another open
            transaction has held a key for 5 s.
        """
        if jobs.unique is None:
            return self.insert_within(connection, jobs)
        with self._naming_locked_keys(lambda: jobs):
            return self._insert_with_limit(connection, jobs, is_hosts=True)

    def _insert_with_limit(
        self, connection: sa.Connection, jobs: NewJobs, *, is_hosts: bool
    ) -> list[Job]:
        with self.lock_limit(connection, _LOCK_SECONDS, is_hosts=is_hosts):
            return self.insert_within(connection, jobs)

    @contextlib.contextmanager
    def _naming_locked_keys(self, current: Callable[[], NewJobs]) -> Iterator[None]:
        """Raise an error that says what to do when another transaction has held a key for too long.

        :param current: returns the jobs that are being inserted.
        """
        try:
            yield
        except DBAPIError as error:
            jobs = current()
            if jobs.unique is None or not self.is_lock_timeout(error):
                raise
            raise _key_is_locked(jobs, jobs.unique) from error

    def insert_within(self, connection: sa.Connection, jobs: NewJobs) -> list[Job]:
        """Do the work of :meth:`insert` within a larger transaction of ours."""
        with self.in_our_schema(connection):
            if jobs.expires_seconds is not None:
                now = self.time_on(connection)
                jobs = _with(jobs, {"deadline_at": _later(now, jobs.expires_seconds)})
            unique = jobs.unique
            insert = self.insert_all if unique is None else self._insert_each_unique
            saved = insert(connection, jobs)
            if _has_limits(jobs):
                self.line_up_new(connection, (job for job in saved if not job.deduplicated))
            return saved

    def _insert_each_unique(self, connection: sa.Connection, jobs: NewJobs) -> list[Job]:
        assert jobs.unique is not None
        found: dict[int, Job] = {}
        if len(jobs.parameters) > 1 and jobs.unique.throttle_seconds is None:
            found = self._insert_first_of_each_key(connection, jobs, jobs.unique)
        return [
            found[number]
            if number in found
            else self._insert_unique(connection, with_key(jobs, number))
            for number in range(len(jobs.parameters))
        ]

    def _insert_first_of_each_key(
        self, connection: sa.Connection, jobs: NewJobs, unique: Unique
    ) -> dict[int, Job]:
        """Insert the first of ``jobs`` with each key that is free, with few statements.

        :returns: the inserted jobs by their number in ``jobs``.
        """
        numbers = {key: n for n, key in reversed([*enumerate(unique.keys)])}
        firsts = sorted(numbers.values())
        columns = self._unique_columns(connection, unique)
        inserted = self.insert_free(connection, _with(chosen(jobs, firsts), columns))
        pairs = zip(firsts, inserted, strict=True)
        return {number: job for number, job in pairs if job is not None}

    def save(self, new: Sequence[NewJobs]) -> list[Job]:
        """Insert jobs as :meth:`insert` does, in a transaction of its own.

        :raises CommitInDoubt: when the connection is lost, so that the jobs may or may not be
            saved.
        :raises UniqueKeyTaken: as :meth:`insert`, but after 30 s.
        """
        first, *others = new
        if not others and first.unique is None:
            is_one_statement = len(first.parameters) == 1 and not _has_limits(first)
            commit = self.autocommit_once if is_one_statement else self.transaction
            return commit(lambda connection: self.insert_within(connection, first))
        # A test may have bound the host's sessions to one connection.
        is_hosts = self.outer_connection is not None
        last = first

        def work(connection: sa.Connection) -> list[Job]:
            nonlocal last
            saved = []
            for jobs in new:
                last = jobs
                if jobs.unique is None:
                    saved += self.insert_within(connection, jobs)
                else:
                    saved += self._insert_with_limit(connection, jobs, is_hosts=is_hosts)
            return saved

        with self._naming_locked_keys(lambda: last):
            return self.transaction(work)

    def _insert_unique(self, connection: sa.Connection, job: NewJobs) -> Job:
        """Insert one unique job, or find the one that holds its key."""
        unique = job.unique
        assert unique is not None
        (key,) = unique.keys
        try_once = self._throttle if unique.throttle_seconds is not None else self._try_unique
        for _ in range(_TRIES):
            if (found := try_once(connection, job, unique, key)) is not None:
                return found
        raise UniqueKeyTaken(
            f"the unique key {key!r} was taken and released by other jobs {_TRIES} times in a row; "
            "try again"
        )

    def _try_unique(
        self, connection: sa.Connection, job: NewJobs, unique: Unique, key: str
    ) -> Job | None:
        """Insert the job, or find the holder of its key.

        :returns: ``None`` if that has changed between two statements.
        """
        key_hash = unique_hash(key)
        columns = self._unique_columns(connection, unique)
        inserted = self.insert_unless_taken(connection, _with(job, columns))
        if inserted is not None:
            return inserted
        if _replaces(unique) and self._replace(connection, job, unique, key_hash):
            replaced = self._holder(connection, key_hash)
            if replaced is not None and replaced.limit_key_id is not None:
                self.notice_change(connection, replaced)
            return replaced
        found = self._holder(connection, key_hash)
        if found is None or self._free_if_expired(connection, found):
            return None
        if unique.on_duplicate == "raise":
            raise UniqueKeyTaken(
                f"job {found.id} holds the unique key {key!r}; it is {found.status}"
            )
        return found

    def _unique_columns(self, connection: sa.Connection, unique: Unique) -> dict[str, Any]:
        """The values of a unique job other than its key."""
        columns: dict[str, Any] = {}
        if unique.until_start:
            columns["unique_until_start"] = True
        if unique.for_seconds is not None or unique.debounce_max_seconds is not None:
            now = self.time_on(connection)
            columns["unique_expires_at"] = _later(now, unique.for_seconds)
            columns["debounce_until"] = _later(now, unique.debounce_max_seconds)
        return columns

    def _holder(self, connection: sa.Connection, key_hash: str) -> Job | None:
        holders = self._holders.where(JOBS.c.unique_hash == key_hash)
        row = connection.execute(holders).one_or_none()
        if row is None:
            return None
        found = loaded_job(row)
        found.deduplicated = True
        return found

    def _free_if_expired(self, connection: sa.Connection, holder: Job) -> bool:
        """Free the key of a job that has outlived its time, if it would hold it for no other
        reason."""
        if holder.unique_expires_at is None:
            # It gives the key up by itself.
            return False
        unfinished = JOBS.c.status.in_([status.value for status in _UNFINISHED])
        needs_key = _HAS_NOT_STARTED if holder.unique_until_start else unfinished
        expired = (
            sa.update(JOBS)
            .where(
                JOBS.c.id == holder.id,
                JOBS.c.unique_hash == holder.unique_hash,
                JOBS.c.unique_expires_at <= self.now,
                ~needs_key,
            )
            .values(unique_hash=None)
        )
        return bool(connection.execute(expired).rowcount)

    def _replace(
        self, connection: sa.Connection, job: NewJobs, unique: Unique, key_hash: str
    ) -> bool:
        """Give the holder of a key the parameters and options of ``job``, if it has not started."""
        columns = _replaced_columns(job)
        if unique.debounce_seconds is None:
            due = (
                self.now if job.delay_seconds is None else self.after(sa.literal(job.delay_seconds))
            )
            columns["run_at"] = due if job.run_at is None else job.run_at
        else:
            moved = self.after(sa.literal(unique.debounce_seconds))
            latest = JOBS.c.debounce_until
            due = sa.case((latest < moved, latest), else_=moved)
            is_due = latest <= self.now
            columns |= transitions.replaced(is_due=is_due, **_ways_to_wait(job))
            columns["run_at"] = due
        # MySQL assigns in the order of the columns: the status last, because others depend on it.
        ordered = sorted(columns.items(), key=lambda item: item[0] == "status")
        replacement = (
            sa.update(JOBS)
            .where(JOBS.c.unique_hash == key_hash, _HAS_NOT_STARTED)
            .ordered_values(*ordered)
        )
        return bool(connection.execute(replacement).rowcount)

    def _throttle(
        self, connection: sa.Connection, job: NewJobs, unique: Unique, key: str
    ) -> Job | None:
        """Insert the job as the first of a window; or else as the one of the next window, or give
        its parameters to that one.

        :returns: ``None`` if another job was inserted or has changed meanwhile.
        """
        seconds = unique.throttle_seconds
        assert seconds is not None
        hashes = [unique_hash(f"{key}\n{slot}") for slot in _THROTTLE_SLOTS]
        window = dt.timedelta(seconds=seconds)
        now = self.time_on(connection)
        rows = connection.execute(self._holders.where(JOBS.c.unique_hash.in_(hashes)))
        holders = [loaded_job(row) for row in rows]
        # A job that ended before it was claimed, such as a cancelled one, has no window.
        possible = [each for each in holders if not (each.is_finished and each.attempt == 0)]
        for later in possible:
            if later.attempt == 0 and later.run_at > now:
                return self._give_parameters(connection, later, job)
        current = [each for each in possible if _ends(each) > now]
        begins = max((_ends(each) for each in current), default=now)
        for expired in holders:
            if expired not in current:
                freed = sa.update(JOBS).where(
                    JOBS.c.id == expired.id, JOBS.c.unique_hash == expired.unique_hash
                )
                connection.execute(freed.values(unique_hash=None))
        taken = {each.unique_hash for each in current}
        free = next(each for each in hashes if each not in taken)
        columns = {
            "unique_hash": free,
            "unique_until_start": True,
            "unique_expires_at": begins + window,
            **transitions.enqueued(waits=bool(current), **_ways_to_wait(job)),
        }
        due = dataclasses.replace(job, delay_seconds=None, run_at=begins)
        return self.insert_unless_taken(connection, _with(due, columns))

    def _give_parameters(self, connection: sa.Connection, holder: Job, job: NewJobs) -> Job | None:
        """Give a job that is not due yet the parameters and options of ``job``."""
        columns = {
            name: value
            for name, value in _replaced_columns(job).items()
            if name not in ("status", "waits_for")
        }
        waiting = sa.update(JOBS).where(
            JOBS.c.id == holder.id,
            JOBS.c.unique_hash == holder.unique_hash,
            _HAS_NOT_STARTED,
        )
        if not connection.execute(waiting.values(columns)).rowcount:
            return None
        return self._holder(connection, str(holder.unique_hash))


def _key_is_locked(jobs: NewJobs, unique: Unique) -> UniqueKeyTaken:
    key = (
        f"the unique key {unique.keys[0]!r}" if len(unique.keys) == 1 else "one of the unique keys"
    )
    return UniqueKeyTaken(
        f"{jobs.values['target']}: another transaction has enqueued a job with {key} and is still "
        "open: commit soon after such an enqueue, or give it session=None, so that it holds the "
        "key only for a moment"
    )


def _with(job: NewJobs, columns: dict[str, Any]) -> NewJobs:
    return dataclasses.replace(job, values={**job.values, **columns})


def _has_limits(job: NewJobs) -> bool:
    return job.values_of(0).get("limit_key_id") is not None


def _ways_to_wait(job: NewJobs) -> dict[str, bool]:
    """What a job waits for before it is pending, as arguments of functions in
    :mod:`~flask_bgjobs.store.transitions`."""
    takes_turns = job.values_of(0).get("fair_key") is not None
    return {"has_limits": _has_limits(job), "takes_turns": takes_turns}


def _replaces(unique: Unique) -> bool:
    return unique.on_duplicate == "replace" or unique.debounce_seconds is not None


def _replaced_columns(job: NewJobs) -> dict[str, Any]:
    """The columns of a job that has not started, when it gets the values of another."""
    return {name: value for name, value in column_values(job).items() if name in _REPLACED}


def _later(now: dt.datetime, seconds: float | None) -> dt.datetime | None:
    return None if seconds is None else now + dt.timedelta(seconds=seconds)


def _ends(job: Job) -> dt.datetime:
    """The end of a job's window."""
    return job.unique_expires_at or job.run_at
