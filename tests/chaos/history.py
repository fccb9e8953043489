"""The history: database triggers record every change of a job's status or attempt."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping

import sqlalchemy as sa
from flask import Flask

from flask_bgjobs.state import state_of

from .app import table

_COLUMNS = (
    "job_id, old_attempt, attempt, old_status, status, retry_count, worker_id, cancel_requested, at"
)
_SQLITE_NOW = "(julianday('now') - 2440587.5) * 86400.0"
_SQLITE = """
CREATE TRIGGER chaos_on_{event} AFTER {when} ON {jobs} BEGIN
  INSERT INTO {history} ({columns})
  VALUES (NEW.id, {old_attempt}, NEW.attempt, {old_status}, NEW.status, NEW.retry_count,
          NEW.worker_id, NEW.cancel_requested_at IS NOT NULL, {now});
END
"""
_SQLITE_TRIGGERS = (
    {
        "event": "update",
        "when": "UPDATE OF status, attempt",
        "old_attempt": "OLD.attempt",
        "old_status": "OLD.status",
    },
    {"event": "insert", "when": "INSERT", "old_attempt": "NULL", "old_status": "NULL"},
)
_POSTGRES = """
CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO {history} ({columns})
  VALUES (NEW.id, OLD.attempt, NEW.attempt, OLD.status, NEW.status, NEW.retry_count,
          NEW.worker_id, NEW.cancel_requested_at IS NOT NULL,
          extract(epoch FROM clock_timestamp()));
  RETURN NULL;
END $$;
CREATE TRIGGER chaos_on_change AFTER INSERT OR UPDATE OF status, attempt ON {jobs}
FOR EACH ROW EXECUTE FUNCTION {function}()
"""
_MYSQL_INSERT = """
INSERT INTO {history} ({columns})
VALUES (NEW.id, {old_attempt}, NEW.attempt, {old_status}, NEW.status, NEW.retry_count,
        NEW.worker_id, NEW.cancel_requested_at IS NOT NULL, UNIX_TIMESTAMP(SYSDATE(6)))
"""
_MYSQL = (
    "CREATE TRIGGER chaos_on_insert AFTER INSERT ON {jobs} FOR EACH ROW "
    + _MYSQL_INSERT.replace("{old_attempt}", "NULL").replace("{old_status}", "NULL"),
    "CREATE TRIGGER chaos_on_update AFTER UPDATE ON {jobs} FOR EACH ROW "
    "IF NEW.status <> OLD.status OR NEW.attempt <> OLD.attempt THEN"
    + _MYSQL_INSERT.replace("{old_attempt}", "OLD.attempt").replace("{old_status}", "OLD.status")
    + "; END IF",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """One recorded change of a job's row."""

    seq: int
    job_id: int
    old_attempt: int | None
    attempt: int
    old_status: str | None
    """``None`` if the job was inserted."""
    status: str
    retry_count: int
    worker_id: int | None
    cancel_requested: bool
    at: float
    """By the database's clock, in seconds since 1970."""

    def __str__(self) -> str:
        worker = "" if self.worker_id is None else f" worker {self.worker_id}"
        asked = " cancel requested" if self.cancel_requested else ""
        return (
            f"{self.at:.3f} {self.old_status or '(new)'} -> {self.status} attempt {self.attempt} "
            f"retries {self.retry_count}{worker}{asked}"
        )


def install(app: Flask) -> None:
    """Create the triggers that record changes; the tables must exist."""
    engine = state_of(app).store.host_engine
    format_table = engine.dialect.identifier_preparer.format_table
    history, jobs = table(app, "chaos_history"), table(app, "bgjobs_job")
    names = {"jobs": format_table(jobs), "history": format_table(history), "columns": _COLUMNS}
    if engine.dialect.name == "sqlite":
        statements = [_SQLITE.format(**names, **each, now=_SQLITE_NOW) for each in _SQLITE_TRIGGERS]
    elif engine.dialect.name in ("mysql", "mariadb"):
        statements = [each.format(**names) for each in _MYSQL]
    else:
        function = "chaos_note" if history.schema is None else f"{history.schema}.chaos_note"
        statements = [_POSTGRES.format(**names, function=function)]
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def read(app: Flask) -> Mapping[int, list[Change]]:
    """The recorded changes of each job, in order."""
    found: dict[int, list[Change]] = collections.defaultdict(list)
    history = table(app, "chaos_history")
    with state_of(app).store.host_engine.connect() as connection:
        for row in connection.execute(sa.select(history).order_by(history.c.seq)):
            found[row.job_id].append(Change(*row))
    return found
