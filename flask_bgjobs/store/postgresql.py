"""PostgreSQL: rows are locked one by one, and who claims passes over what others hold."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError

from ..models import UtcTime
from ..spec import Key
from .base import Store
from .database import ALONE, JOBS, READ_ONLY
from .links import limited, refuse_dead, shut_down
from .settles import COMPLETION_TYPES, Completion

_CONNECT_SECONDS = 10.0
_LIBPQ_DRIVERS = ("psycopg", "psycopg2")
_REDO = frozenset({"40001", "40P01", "55P03"})
"""Serialization failure, deadlock, lock not available."""


class PostgresStore(Store):
    """The statements on PostgreSQL 12 or newer."""

    # In a query of its own it is read once, so that comparing with it can use an index.
    now = sa.literal_column("(SELECT clock_timestamp() AT TIME ZONE 'UTC')", UtcTime)
    insert_into = staticmethod(postgresql.insert)

    def plus(
        self, time: sa.ColumnElement[Any], seconds: sa.ColumnElement[float]
    ) -> sa.ColumnElement[dt.datetime]:
        return time + seconds * sa.literal_column("interval '1 second'", sa.Interval)

    def complete_within(
        self, connection: sa.Connection, worker_id: int, ended: Sequence[Completion]
    ) -> Collection[Key]:
        # In one statement: PostgreSQL takes ten times as long for one each.
        parameters = {"ended": json.dumps(ended), "fence_worker": worker_id}
        rows = connection.execute(self._complete_all, parameters)
        return {(row.id, row.attempt) for row in rows}

    @functools.cached_property
    def _complete_all(self) -> Any:
        columns = [sa.column(name, kind) for name, kind in COMPLETION_TYPES.items()]
        rows = sa.func.json_to_recordset(sa.bindparam("ended", type_=sa.Text).cast(postgresql.JSON))
        ended = rows.table_valued(*columns).render_derived(with_types=True)
        return self.completing(dict(ended.c)).returning(JOBS.c.id, JOBS.c.attempt)

    def locked(self, candidates: sa.Select[Any]) -> sa.Select[Any]:
        free = candidates.with_for_update(of=JOBS, skip_locked=True).cte()
        # Materialized, or the planner might look for candidates more than once.
        return sa.select(free.prefix_with("MATERIALIZED").c.id)

    def make_engine(self) -> sa.Engine:
        engine = sa.create_engine(
            self.host_engine.url,
            creator=self._connect,
            isolation_level="READ COMMITTED",
            max_overflow=-1,
        )
        refuse_dead(engine, lambda connection: int(connection.fileno()))
        if self.deadline is not None:
            sa.event.listen(engine, "begin", self._limit_idle)
        return engine

    def _connect(self) -> Any:
        """The same as :meth:`connect_as_host`, with an end to the waiting."""
        # libpq takes whole seconds, and waits for two of them at least.
        seconds = math.ceil(max(2.0, min(_CONNECT_SECONDS, self.seconds_left())))
        is_libpq = self.host_engine.driver in _LIBPQ_DRIVERS
        with limited(self.host_engine, {"connect_timeout": seconds} if is_libpq else {}):
            return self.connect_as_host()

    def texts(self, array: sa.BindParameter[str]) -> tuple[Any, Any]:
        elements = sa.func.json_array_elements_text(array.cast(postgresql.JSON))
        each = elements.table_valued("text", with_ordinality="position").render_derived()
        return each.c.position, each.c.text

    def typed(self, value: sa.BindParameter[Any]) -> sa.ColumnElement[Any]:
        return sa.cast(value, value.type)

    def dialect_options(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**options, "isolation_level": "AUTOCOMMIT"} if ALONE in options else options

    def _limit_idle(self, connection: sa.Connection) -> None:
        """Let the server end the transaction of a worker that has fallen silent within it.

        Its rows stay locked for as long, also for those that would rescue its jobs.
        """
        if not {READ_ONLY, ALONE} & connection.get_execution_options().keys():
            limit = f"{self.deadline:.3f}s"
            connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = '{limit}'")

    def sever(self, driver_connection: Any) -> None:
        with contextlib.suppress(Exception):
            shut_down(driver_connection.fileno())

    def is_redoable(self, error: DBAPIError) -> bool:
        # psycopg 3 and psycopg2 have their own words for it.
        code = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
        return code in _REDO
