"""Backlog: throughput while the table holds very many unrelated rows."""

from __future__ import annotations

import sqlalchemy as sa

from ..contender import Contender
from ..contenders.bgjobs import BY_STORE, COMMANDS
from ..journal import Journal
from ..measure import Figures, Measure, Scale
from ..ours import BACKLOGS, CLAIMED_JOBS, TEMPLATE_NUMBER
from ..processes import python
from ..stores import Stores
from ..trial import Trial, TrialFailed

_JOBS = 20_000
_LOOK_SECONDS = 0.5
_SIZES = (100_000, 1_000_000)
NUMBERS = {
    "sqlite": "WITH RECURSIVE copies(n) AS "
    "(SELECT 1 UNION ALL SELECT n + 1 FROM copies WHERE n < {0}) ",
    "postgresql": "WITH copies(n) AS (SELECT generate_series(1, {0})) ",
    "mariadb": "WITH copies(n) AS (SELECT seq FROM seq_1_to_{0}) ",
}
"""A query that generates rows, in the SQL dialect of each database."""
_UNSETTLED = (
    "SELECT count(*) FROM bgjobs_job WHERE status <> 'completed' AND parameters <> "
    f"'[{TEMPLATE_NUMBER}]'"
)


def run(contender: type[Contender], stores: Stores, scale: Scale) -> Figures:
    """Jobs per second, and milliseconds per claim, by kind and number of other rows.

    Each combination is measured on its own database.
    """
    jobs = scale.number(_JOBS)
    figures = _measure(contender, stores, jobs, "none", 0)
    for kind in BACKLOGS:
        for size in _SIZES:
            figures |= _measure(contender, stores, jobs, kind, scale.number(size))
    return dict(figures)


MEASURE = Measure("backlog", run, suits=lambda contender: contender in BY_STORE, most_runs=1)


def _measure(
    contender: type[Contender], stores: Stores, jobs: int, kind: str, size: int
) -> dict[str, float]:
    with Trial(contender, stores) as trial:
        if size:
            _pile_up(trial, kind, size)
        return {
            f"{kind}_{size}": _jobs_per_second(trial, range(jobs)),
            f"{kind}_{size}_claim_ms": _claim_ms(trial),
        }


def _pile_up(trial: Trial, kind: str, size: int) -> None:
    """Create the backlog: one job through the public API, then copies of its row by SQL."""
    trial.execute(python("-m", "benchmarks.ours", "template", kind))
    if kind == "completed":
        trial.execute([*trial.contender.worker_command(), "--burst"])
    elif kind == "paused":
        trial.execute(python(*COMMANDS, "pause", BACKLOGS[kind]["queue"]))
    with trial.database.engine.begin() as connection:
        columns = ", ".join(
            f"t.{column['name']}"
            for column in sa.inspect(connection).get_columns("bgjobs_job")
            if column["name"] != "id"
        )
        numbers = NUMBERS[trial.contender.store].format(size - 1)
        connection.exec_driver_sql(
            f"INSERT INTO bgjobs_job ({columns.replace('t.', '')}) "
            f"{numbers} SELECT {columns} FROM bgjobs_job t CROSS JOIN copies"
        )


def _jobs_per_second(trial: Trial, numbers: range) -> float:
    """Jobs per second for ``numbers`` only, not for jobs of the backlog that run afterwards."""
    trial.fill(numbers)
    with trial.worker() as worker:
        trial.wait_until(lambda: trial.recorded() >= len(numbers), worker)
        # Less often, because the query reads the whole table.
        trial.wait_until(lambda: trial.database.count(_UNSETTLED) == 0, worker, every=_LOOK_SECONDS)
        journal = Journal.read(trial.journal).without(TEMPLATE_NUMBER)
    if problem := journal.problem(numbers):
        raise TrialFailed(problem)
    return journal.per_second()


def _claim_ms(trial: Trial) -> float:
    trial.fill(range(CLAIMED_JOBS))
    return float(trial.execute(python("-m", "benchmarks.ours", "claims")))
