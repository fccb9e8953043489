"""Everything that dashboard and CLI read. No row is changed here.

What these functions hand out is masked already, apart from :attr:`JobRow.job`, which is for
the authorizer only. So a template cannot show a secret by mistake. All statements run on the
store's own connection: the host's session is never touched.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import datetime as dt
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sqlalchemy as sa

from .. import serialize
from ..app_state import AppState
from ..models import Attempt, Job, JobLog, Queue, Worker, detached_job
from ..redact import MASK
from ..states import FINAL, WAITING, JobStatus
from ..text import storable

MAX_PER_PAGE = 200
SEARCHED_ROWS = 100_000
"""A text search reads the newest rows only: no index can serve it."""

_SEARCH_SECONDS = 2.0
"""For checking what a search found against what is shown of it."""
_MAX_LISTED_PARAMETERS = 16 * 1024
"""Characters of parameters that a list loads; it must stay quick with jobs of 1 MiB."""
_MAX_CHUNK = 2_000
_MAX_SHOWN = 64 * 1024
_MAX_LINES = 500
_MAX_AHEAD = 1_000
_LIVE_CAP, _FINISHED_CAP = 100_000, 10_000
_MAX_ID = 2**63 - 1

_job = Job.__table__
_worker = Worker.__table__
_LIST_COLUMNS = [
    column
    for column in _job.c
    if column.name not in ("parameters", "result", "meta", "unique_hash")
]
_LISTED_PARAMETERS = sa.case(
    (sa.func.length(_job.c.parameters) <= _MAX_LISTED_PARAMETERS, _job.c.parameters),
    else_=None,
).label("parameters")


class InvalidCursor(ValueError):
    """The cursor of a page was not made by :func:`list_jobs`."""


@dataclasses.dataclass(frozen=True, slots=True)
class JobFilters:
    """Which jobs to list; what is empty does not filter.

    :raises ValueError: when a status is not one of :class:`~flask_bgjobs.JobStatus`.
    """

    statuses: tuple[str, ...] = ()
    queues: tuple[str, ...] = ()
    q: str = ""
    """Part of what is shown of a job, without regard to case, or exactly its id."""

    def __post_init__(self) -> None:
        known = [status.value for status in JobStatus]
        for status in self.statuses:
            if status not in known:
                raise ValueError(f"there is no status {status!r}; there are {', '.join(known)}")

    def __bool__(self) -> bool:
        return bool(self.statuses or self.queues or self.q)


@dataclasses.dataclass(frozen=True, slots=True)
class JobRow:
    """One job of a list; its texts are masked."""

    id: int
    target: str
    method: str | None
    parameters: str | None
    """JSON on one line; ``None`` when it is too large for a list or cannot be read."""
    queue: str
    status: str
    is_cancelling: bool
    """It runs, and was asked to stop."""
    priority: int
    attempt: int
    retry_count: int
    retries: int
    progress: float | None
    progress_note: str | None
    run_at: dt.datetime
    created_at: dt.datetime
    started_at: dt.datetime | None
    finished_at: dt.datetime | None
    error_type: str | None
    error: str | None
    tags: tuple[str, ...]
    owner: str | None
    unique_key: str | None
    job: Job = dataclasses.field(repr=False, compare=False)
    """For the authorizer: not masked, and without result and meta in a list."""

    @property
    def name(self) -> str:
        """Target and method as one dotted name."""
        return self.target if self.method is None else f"{self.target}.{self.method}"

    @property
    def state(self) -> str:
        """The status, or ``cancelling``."""
        return "cancelling" if self.is_cancelling else self.status


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """Some jobs of a list, newest first."""

    jobs: list[JobRow]
    newer: str | None
    """Cursor of the page before; pass it as ``before``."""
    older: str | None
    """Cursor of the page after; pass it as ``after``."""
    is_cut: bool = False
    """The search took too long and was stopped: narrow it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Count:
    """A number of jobs that is counted up to a limit only."""

    number: int
    limit: int

    def __str__(self) -> str:
        if self.number > self.limit:
            return f"{self.limit // 1000}k+"
        return f"{self.number:,}"

    def __bool__(self) -> bool:
        return self.number > 0


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker that holds a lease."""

    id: int
    name: str
    queues: tuple[str, ...] | None
    """``None`` serves all."""
    heartbeat_at: dt.datetime
    is_silent: bool
    """Not heard of for the lease: it is probably dead."""

    def serves(self, queue: str) -> bool:
        """Whether it is alive and takes jobs of ``queue``."""
        return not self.is_silent and (self.queues is None or queue in self.queues)


@dataclasses.dataclass(frozen=True, slots=True)
class Service:
    """Who serves what at the moment."""

    now: dt.datetime
    """The database's clock."""
    workers: list[WorkerRow]
    queues: list[str]
    """Every queue known: of the configuration, of claimed jobs and of pending ones."""
    paused: frozenset[str]
    unserved: list[str]
    """Queues that hold pending jobs, are not paused, and have no live worker."""

    @property
    def alive(self) -> int:
        """How many workers are heard of."""
        return sum(not worker.is_silent for worker in self.workers)

    @property
    def silent(self) -> int:
        """How many workers are not heard of any more."""
        return len(self.workers) - self.alive


@dataclasses.dataclass(frozen=True, slots=True)
class AttemptRow:
    """An attempt that did not complete; its texts are masked."""

    attempt: int
    outcome: str
    worker_name: str | None
    started_at: dt.datetime | None
    finished_at: dt.datetime
    error: str | None
    traceback: str | None

    @property
    def run_seconds(self) -> float | None:
        """How long its code ran; ``None`` when it never started."""
        if self.started_at is None:
            return None
        return max(0.0, (self.finished_at - self.started_at).total_seconds())


@dataclasses.dataclass(frozen=True, slots=True)
class LogLine:
    """A line that the job wrote; masked."""

    attempt: int
    created_at: dt.datetime
    message: str


@dataclasses.dataclass(frozen=True, slots=True)
class JobDetail:
    """All that is known of one job; its texts are masked."""

    row: JobRow
    parameters: str
    """JSON, indented."""
    result: str | None
    meta: str | None
    attempts: list[AttemptRow]
    """Newest first."""
    lines: list[LogLine]
    """Oldest first; the newest 500."""
    worker_name: str | None
    """Of the newest attempt."""
    reasons: list[str]
    """Why it is not running, as sentences; empty when it runs or is finished."""
    now: dt.datetime
    """The database's clock."""


# Lists


def list_jobs(
    state: AppState,
    filters: JobFilters | None = None,
    *,
    after: str | None = None,
    before: str | None = None,
    per: int = 50,
    visible: Callable[[Job], bool] | None = None,
) -> Page:
    """A page of jobs, newest first.

    :param after: the ``older`` cursor of a page, to get what follows it.
    :param before: the ``newer`` cursor of a page, to get what precedes it.
    :param per: jobs per page, 1 to 200; other numbers are moved into that range.
    :param visible: leaves out the jobs for which it is false.
    :raises InvalidCursor: when a cursor is not one of ours.
    """
    filters = filters or JobFilters()
    per = min(max(per, 1), MAX_PER_PAGE)
    upwards = before is not None and after is None
    cursor = _decode_cursor(before if upwards else after)
    with state.store.read() as connection:
        rows, is_cut = _take(state, connection, filters, cursor, upwards, visible, per + 1)
    more = len(rows) > per
    rows = rows[:per]
    if upwards:
        rows.reverse()
    has_newer = more if upwards else cursor is not None
    has_older = upwards or more
    return Page(
        jobs=rows,
        newer=_encode_cursor(rows[0].id) if rows and has_newer else None,
        older=_encode_cursor(rows[-1].id) if rows and has_older else None,
        is_cut=is_cut,
    )


def recent_failures(
    state: AppState, limit: int = 5, *, visible: Callable[[Job], bool] | None = None
) -> list[JobRow]:
    """The jobs that failed last, newest failure first."""
    statement = (
        sa.select(*_LIST_COLUMNS, _LISTED_PARAMETERS)
        .where(_job.c.status == JobStatus.FAILED.value)
        .order_by(_job.c.finished_at.desc(), _job.c.id.desc())
    )
    # Some may be hidden from the visitor; a few more make up for them.
    statement = statement.limit(limit if visible is None else limit * 10)
    with state.store.read() as connection:
        found = connection.execute(statement).mappings().all()
    rows = [_listed_row(state, values) for values in found]
    return [row for row in rows if visible is None or visible(row.job)][:limit]


def count_by_status(state: AppState) -> dict[str, Count]:
    """How many jobs have each status: finished ones counted to 10,000, others to 100,000."""
    limits = {status.value: _FINISHED_CAP if status in FINAL else _LIVE_CAP for status in JobStatus}
    counts = [_capped_count(status, limit).label(status) for status, limit in limits.items()]
    with state.store.read() as connection:
        row = connection.execute(sa.select(*counts)).one()
    return {status: Count(row._mapping[status], limit) for status, limit in limits.items()}


def _capped_count(status: str, limit: int) -> sa.ScalarSelect[int]:
    some = sa.select(_job.c.id).where(_job.c.status == status).limit(limit + 1).subquery()
    return sa.select(sa.func.count()).select_from(some).scalar_subquery()


def _take(
    state: AppState,
    connection: sa.Connection,
    filters: JobFilters,
    cursor: int | None,
    upwards: bool,
    visible: Callable[[Job], bool] | None,
    limit: int,
) -> tuple[list[JobRow], bool]:
    """The first ``limit`` rows that match and are visible, and whether time ran out.

    Read in chunks that grow, so that the database always plans for a few rows.
    """
    rows: list[JobRow] = []
    chunk = limit
    deadline = time.monotonic() + _SEARCH_SECONDS
    while True:
        found = connection.execute(_list_statement(filters, cursor, upwards, chunk)).mappings()
        values_read = found.all()
        for values in values_read:
            row = _listed_row(state, values)
            if (visible is None or visible(row.job)) and _matches(row, filters.q):
                rows.append(row)
            if len(rows) >= limit or time.monotonic() > deadline:
                return rows, len(rows) < limit
        if len(values_read) < chunk:
            return rows, False
        cursor = values_read[-1]["id"]
        chunk = min(chunk * 4, _MAX_CHUNK)


def _list_statement(
    filters: JobFilters, cursor: int | None, upwards: bool, limit: int
) -> sa.Select[Any]:
    order = _job.c.id.asc() if upwards else _job.c.id.desc()
    wanted: list[sa.ColumnElement[bool]] = []
    if filters.queues:
        wanted.append(_job.c.queue.in_(filters.queues))
    if filters.q:
        wanted.append(_may_match(filters.q))
    if cursor is not None:
        wanted.append(_job.c.id > cursor if upwards else _job.c.id < cursor)
    statement = sa.select(*_LIST_COLUMNS, _LISTED_PARAMETERS).order_by(order).limit(limit)
    if len(filters.statuses) < 2:
        return statement.where(*wanted, *(_job.c.status == each for each in filters.statuses))
    # One index range per status, merged: with IN, a database would sort every job of them.
    ranges = [
        sa.select(_job.c.id)
        .where(_job.c.status == status, *wanted)
        .order_by(order)
        .limit(limit)
        .subquery()
        for status in filters.statuses
    ]
    merged = sa.union_all(*(sa.select(each.c.id) for each in ranges)).subquery()
    return statement.where(_job.c.id.in_(sa.select(merged.c.id)))


def _may_match(q: str) -> sa.ColumnElement[bool]:
    """True for every row that :func:`_matches` could accept; what is masked may match as well."""
    newest = sa.select(sa.func.coalesce(sa.func.max(_job.c.id), 0)).scalar_subquery()
    texts = (_job.c.target, _job.c.method, _job.c.error, _job.c.owner, _job.c.unique_key)
    name = sa.func.coalesce(_job.c.target + "." + _job.c.method, _job.c.target)
    found: list[sa.ColumnElement[bool]] = [
        text.icontains(q, autoescape=True) for text in (*texts, name)
    ]
    # Parameters and tags are stored as JSON, where other letters and quotes are escapes.
    as_stored = {q, json.dumps(q)[1:-1]}
    found += [
        column.icontains(text, autoescape=True)
        for column in (_job.c.parameters, _job.c.tags)
        for text in as_stored
    ]
    recent = sa.and_(_job.c.id > newest - SEARCHED_ROWS, sa.or_(*found))
    job_id = _as_id(q)
    return recent if job_id is None else sa.or_(_job.c.id == job_id, recent)


def _matches(row: JobRow, q: str) -> bool:
    """Whether what is *shown* of the job contains ``q``, so that no search finds a secret."""
    if not q or row.id == _as_id(q):
        return True
    shown = (
        row.target,
        row.method,
        row.name,
        row.parameters,
        row.error,
        row.owner,
        row.unique_key,
        *row.tags,
    )
    wanted = q.casefold()
    return any(text is not None and wanted in text.casefold() for text in shown)


def _listed_row(state: AppState, values: Mapping[Any, Any]) -> JobRow:
    attributes = {
        Job.__mapper__.get_property_by_column(column).key: values[column.name]
        for column in _LIST_COLUMNS
    }
    if values["parameters"] is not None:
        attributes["parameters_json"] = values["parameters"]
    shown = _Shown.of(state, values["target"], values["method"], values["parameters"])
    return _row(detached_job(attributes), shown)


def _row(job: Job, shown: _Shown) -> JobRow:
    return JobRow(
        id=job.id,
        target=job.target,
        method=job.method,
        parameters=shown.parameters(),
        queue=job.queue,
        status=job.status,
        is_cancelling=job.is_cancelling,
        priority=job.priority,
        attempt=job.attempt,
        retry_count=job.retry_count,
        retries=job.retries,
        progress=None if job.progress is None else min(max(job.progress, 0.0), 1.0),
        progress_note=shown.text(job.progress_note),
        run_at=job.run_at,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        error_type=job.error_type,
        error=shown.text(job.error, instead=job.error_type),
        tags=tuple(shown.text(tag) or "" for tag in _tags(job)),
        owner=shown.text(job.owner),
        unique_key=shown.text(job.unique_key),
        job=job,
    )


def _tags(job: Job) -> list[str]:
    try:
        return [str(tag) for tag in job.tags]
    except (ValueError, TypeError):
        return []


# One job


def job_detail(state: AppState, job: Job) -> JobDetail:
    """All that is known of ``job``, masked.

    :param job: freshly read, as by ``state.store.get``.
    """
    shown = _Shown.of(state, job.target, job.method, job.parameters_json)
    with state.store.read() as connection:
        attempts = connection.execute(
            sa.select(Attempt.__table__)
            .where(Attempt.job_id == job.id)
            .order_by(Attempt.attempt.desc(), Attempt.id.desc())
            .limit(_MAX_LINES)
        ).all()
        lines = connection.execute(
            sa.select(JobLog.attempt, JobLog.created_at, JobLog.message)
            .where(JobLog.job_id == job.id)
            .order_by(JobLog.id.desc())
            .limit(_MAX_LINES)
        ).all()
        worker_name, ahead = connection.execute(
            sa.select(
                sa.select(_worker.c.name).where(_worker.c.id == job.worker_id).scalar_subquery(),
                _count_ahead(job) if job.status == JobStatus.PENDING else sa.literal(0),
            )
        ).one()
    service = service_now(state)
    return JobDetail(
        row=_row(job, shown),
        parameters=shown.parameters(indented=True) or "not readable",
        result=shown.value(job.result_json),
        meta=shown.value(job.meta_json),
        attempts=[_attempt_row(row, shown) for row in attempts],
        lines=[
            LogLine(row.attempt, row.created_at, shown.text(row.message) or "")
            for row in reversed(lines)
        ],
        worker_name=worker_name,
        reasons=_reasons(job, service, worker_name, ahead),
        now=service.now,
    )


def _attempt_row(row: sa.Row[Any], shown: _Shown) -> AttemptRow:
    return AttemptRow(
        attempt=row.attempt,
        outcome=row.outcome,
        worker_name=row.worker_name,
        started_at=row.started_at,
        finished_at=row.finished_at,
        error=shown.text(row.error, instead=row.error_type),
        traceback=shown.text(row.traceback),
    )


def _reasons(job: Job, service: Service, worker_name: str | None, ahead: int) -> list[str]:
    if job.status == JobStatus.RUNNING:
        return list(_running_trouble(job, service, worker_name))
    if job.status not in WAITING:
        return []
    reasons = []
    if job.status == JobStatus.RETRYING and job.run_at > service.now:
        reasons.append("Its last attempt failed, and the time of its next retry has not come.")
    elif job.status != JobStatus.PENDING and job.run_at > service.now:
        reasons.append("It is not due yet.")
    if job.queue in service.paused:
        reasons.append(f"The queue {job.queue} is paused.")
    if not any(worker.serves(job.queue) for worker in service.workers):
        reasons.append(
            f"No live worker serves the queue {job.queue}. Start one with: flask bgjobs worker"
        )
    if ahead:
        more = "More than 1,000" if ahead > _MAX_AHEAD else f"{ahead:,}"
        jobs, stand = ("job", "stands") if ahead == 1 else ("jobs", "stand")
        reasons.append(f"{more} {jobs} of the queue {job.queue} {stand} before it.")
    return reasons or ["It is due; the next free worker takes it."]


def _count_ahead(job: Job) -> sa.ScalarSelect[int]:
    """How many jobs of its queue are claimed before ``job``, counted to a limit."""
    ahead = (
        sa.select(_job.c.id)
        .where(
            _job.c.status == JobStatus.PENDING.value,
            _job.c.queue == job.queue,
            sa.or_(
                _job.c.claim_rank < job.claim_rank,
                sa.and_(
                    _job.c.claim_rank == job.claim_rank,
                    sa.or_(
                        _job.c.run_at < job.run_at,
                        sa.and_(_job.c.run_at == job.run_at, _job.c.id < job.id),
                    ),
                ),
            ),
        )
        .limit(_MAX_AHEAD + 1)
        .subquery()
    )
    return sa.select(sa.func.count()).select_from(ahead).scalar_subquery()


def _running_trouble(job: Job, service: Service, worker_name: str | None) -> Iterator[str]:
    holder = next((worker for worker in service.workers if worker.id == job.worker_id), None)
    if holder is not None and holder.is_silent:
        yield (
            f"Its worker {holder.name} is silent; another worker takes the job over once it "
            "finds the lease run out."
        )
    elif job.started_at is None:
        yield f"The worker {worker_name or job.worker_id} has claimed it and starts it next."


# Workers and queues


def service_now(state: AppState) -> Service:
    """Who serves what at the moment, by the database's clock."""
    with state.store.read() as connection:
        now: dt.datetime = connection.execute(sa.select(state.store.now)).scalar_one()
        workers = [
            _worker_row(row, now, state.config.lease)
            for row in connection.execute(
                sa.select(_worker).where(_worker.c.status == "alive").order_by(_worker.c.id)
            )
        ]
        queues = connection.execute(sa.select(Queue.name, Queue.paused_at)).all()
        pending = list(connection.execute(_pending_queues()).scalars())
    paused = frozenset(row.name for row in queues if row.paused_at is not None)
    known = {row.name for row in queues} | set(pending) | set(state.config.queues or ())
    return Service(
        now=now,
        workers=workers,
        queues=sorted(known),
        paused=paused,
        unserved=[
            name
            for name in pending
            if name not in paused and not any(worker.serves(name) for worker in workers)
        ],
    )


def _worker_row(row: sa.Row[Any], now: dt.datetime, lease: float) -> WorkerRow:
    return WorkerRow(
        id=row.id,
        name=row.name,
        queues=None if row.queues is None else tuple(json.loads(row.queues)),
        heartbeat_at=row.heartbeat_at,
        is_silent=(now - row.heartbeat_at).total_seconds() > lease,
    )


def _pending_queues() -> sa.Select[Any]:
    """The queues that hold pending jobs: one index seek each, where DISTINCT reads them all."""
    pending = _job.c.status == JobStatus.PENDING.value
    walk = (
        sa.select(sa.func.min(_job.c.queue).label("name"))
        .where(pending)
        .cte("pending_queue", recursive=True)
    )
    following = (
        sa.select(sa.func.min(_job.c.queue))
        .where(pending, _job.c.queue > walk.c.name)
        .correlate(walk)
        .scalar_subquery()
    )
    walk = walk.union_all(sa.select(following).where(walk.c.name.is_not(None)))
    return sa.select(walk.c.name).where(walk.c.name.is_not(None)).order_by(walk.c.name)


# Masking


@dataclasses.dataclass(frozen=True, slots=True)
class _Shown:
    """What may be shown of one job's values."""

    state: AppState
    target: str
    method: str | None
    values: Any
    is_known: bool
    """Without the parameters nobody knows which words of its other texts are secret."""

    @classmethod
    def of(cls, state: AppState, target: str, method: str | None, parameters: str | None) -> _Shown:
        """For a job with these ``parameters``, as stored; ``None`` when they are not loaded."""
        values = _read_parameters(parameters)
        return cls(state, target, method, values, values is not None)

    def parameters(self, *, indented: bool = False) -> str | None:
        """The masked parameters as JSON; ``None`` when they are not known."""
        if not self.is_known:
            return None
        masked = self.state.masked_parameters(self.target, self.method, self.values)
        return _json(masked, indented=indented)

    def value(self, text: str | None) -> str | None:
        """A stored result or meta as indented JSON, with secret keys and values masked."""
        if text is None:
            return None
        try:
            return _json(self._mask_leaves(self.state.redactor.mask(serialize.loads(text))))
        except ValueError:
            return "not readable"

    def text(self, text: str | None, *, instead: str | None = None) -> str | None:
        """``text`` without the values that are masked in the parameters."""
        if not text:
            return text
        if not self.is_known:
            return instead
        return self.state.masked_text(text, self.target, self.method, self.values)

    def _mask_leaves(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._mask_leaves(item) for key, item in value.items()}
        if isinstance(value, list | tuple | set):
            return [self._mask_leaves(item) for item in value]
        if isinstance(value, str):
            return self.text(value, instead=MASK)
        if value is None or isinstance(value, bool):
            return value
        # A number or a date may be the secret itself.
        return value if self.text(str(value)) == str(value) else MASK


def _json(value: Any, *, indented: bool = True) -> str:
    text = serialize.dumps_plain(value)
    if indented:
        text = json.dumps(json.loads(text), ensure_ascii=False, indent=2)
    # JSON holds lone surrogates as escapes, which cannot be encoded into a page.
    return storable(text, _MAX_SHOWN)


# Cursors


def _encode_cursor(job_id: int) -> str:
    return base64.urlsafe_b64encode(f"id:{job_id}".encode()).decode().rstrip("=")


def _decode_cursor(cursor: str | None) -> int | None:
    if cursor is None:
        return None
    try:
        text = base64.urlsafe_b64decode(cursor.encode() + b"=" * (-len(cursor) % 4))
    except (binascii.Error, ValueError):
        text = b""
    match = re.fullmatch(rb"id:(\d{1,18})", text)
    if match is None:
        raise InvalidCursor("the page's cursor is not one of ours; start at the first page")
    return int(match[1])


def _as_id(q: str) -> int | None:
    text = q.removeprefix("#")
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def is_possible_id(job_id: int) -> bool:
    """Whether the database can hold the id at all, so that it may be asked for."""
    return 0 < job_id <= _MAX_ID


def is_readable(job: Job) -> bool:
    """Whether the parameters of ``job`` can be read back."""
    return _read_parameters(job.parameters_json) is not None


def _read_parameters(text: str | None) -> Any:
    try:
        values = None if text is None else serialize.loads(text)
    except ValueError:
        return None
    return values if isinstance(values, list | tuple | dict) else None
