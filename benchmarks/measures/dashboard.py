"""The dashboard: milliseconds of server time for each page, with a million jobs in the table."""

from __future__ import annotations

import json

import sqlalchemy as sa

from ..contender import Contender
from ..contenders.bgjobs import BY_STORE
from ..measure import Figures, Measure, Scale
from ..processes import python
from ..stores import Stores
from ..trial import Trial
from .backlog import NUMBERS

_JOBS = 1_000_000
_STATUS = """
CASE n & 15 WHEN 0 THEN 'failed' WHEN 1 THEN 'cancelled' WHEN 2 THEN 'scheduled'
WHEN 3 THEN 'retrying' WHEN 4 THEN 'pending' ELSE 'completed' END
"""
"""Eleven of sixteen jobs are completed."""
_CHANGES = {
    "status": _STATUS,
    "queue": "CASE (n >> 4) & 7 WHEN 0 THEN 'mail' WHEN 1 THEN 'reports' ELSE 'default' END",
    "finished_at": f"CASE WHEN {_STATUS} IN ('failed', 'cancelled', 'completed') "
    "THEN t.created_at END",
}
"""Columns whose values differ from the copied job."""


def run(contender: type[Contender], stores: Stores, scale: Scale) -> Figures:
    """Milliseconds by page: the median of several requests."""
    with Trial(contender, stores) as trial:
        trial.execute(python("-m", "benchmarks.ours", "template", "scheduled"))
        _pile_up(trial, scale.number(_JOBS))
        return dict(json.loads(trial.execute(python("-m", "benchmarks.ours", "pages"))))


MEASURE = Measure("dashboard", run, suits=lambda contender: contender in BY_STORE, most_runs=1)


def _pile_up(trial: Trial, size: int) -> None:
    """Copy the job many times, with all statuses and three queues."""
    with trial.database.engine.begin() as connection:
        columns = [column["name"] for column in sa.inspect(connection).get_columns("bgjobs_job")]
        columns.remove("id")
        values = ", ".join(_CHANGES.get(column, f"t.{column}") for column in columns)
        numbers = NUMBERS[trial.contender.store].format(size)
        connection.exec_driver_sql(
            f"INSERT INTO bgjobs_job ({', '.join(columns)}) "
            f"{numbers} SELECT {values} FROM bgjobs_job t CROSS JOIN copies"
        )
    if trial.contender.store == "postgresql":
        # Autovacuum does this within minutes. In practice a million jobs do not arrive at once.
        with trial.database.engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.exec_driver_sql("VACUUM ANALYZE bgjobs_job")
