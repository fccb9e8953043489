"""The tables of a benchmark, printed or written to the documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from .contenders import ALL
from .ours import BACKLOGS, PAGES
from .results import Entry, Results
from .stores import title_of
from .tables import Table, figure

Columns = dict[str, str]
"""Column headings by name of the figure."""
_COLUMNS: dict[str, Columns] = {
    "throughput": {
        "jobs_per_second": "jobs/s",
        "worker_cpu_ms": "worker CPU, ms/job",
        "store_cpu_ms": "database CPU, ms/job",
        "memory_mib": "worker, MiB",
    },
    "enqueue": {
        "one_per_second": "one by one/s",
        "bare_rows_per_job": "bare inserts per enqueue",
        "bulk_per_second": "in bulk/s",
    },
    "latency": {"p50_ms": "p50, ms", "p95_ms": "p95, ms", "p99_ms": "p99, ms"},
    "idle": {
        "statements_per_minute": "statements/min",
        "cpu_ms_per_minute": "CPU, ms/min",
    },
    "limits": {
        "no_limit": "no limit, jobs/s",
        "one_key": "10 at once, jobs/s",
        "many_keys": "1 at once for each of 10,000 keys, jobs/s",
        "start_beside_none_ms": "start on an empty table, ms",
        "start_beside_many_ms": "start beside 100,000 that wait, ms",
    },
    "memory": {
        "idle_mib": "idle, MiB",
        "end_mib": "at the end, MiB",
        "growth_mib": "growth after the first tenth, MiB",
    },
}


def tables(results: Results) -> Iterator[tuple[str, Table]]:
    """The name and the table of each measurement."""
    for measure, entries in results.entries.items():
        if measure == "backlog":
            yield measure, _backlog_table(entries)
        elif measure == "dashboard":
            yield measure, _dashboard_table(entries)
        else:
            yield measure, _table(entries, _COLUMNS[measure])
    yield "machine", _machine_table(results)


def print_tables(results: Results, say: Callable[[str], object]) -> None:
    """Print all tables."""
    for name, table in tables(results):
        say(f"\n{name}\n{table.as_text()}")


def write_tables(results: Results, folder: Path) -> None:
    """Write each table to a file, which the documentation includes."""
    folder.mkdir(exist_ok=True)
    for name, table in tables(results):
        (folder / f"{name}.rst").write_text(table.as_rst())


def _table(entries: dict[str, Entry], columns: Columns) -> Table:
    rows = []
    for name, entry in entries.items():
        contender = ALL[name]
        figures = entry.medians()
        cells = [figure(figures.get(column)) for column in columns]
        if entry.failure is not None:
            cells = ["failed", *[""] * (len(columns) - 1)]
        rows.append([contender.title, title_of(contender.store), *cells])
    return Table(["queue", "store", *columns.values()], rows)


def _backlog_table(entries: dict[str, Entry]) -> Table:
    """A row for each kind and size of backlog, with jobs/s and milliseconds per claim for each
    database."""
    found = {name: entry.medians() for name, entry in entries.items()}
    backlogs = dict.fromkeys(
        name for figures in found.values() for name in figures if not name.endswith("_claim_ms")
    )
    header = ["other rows", "number"]
    for name in found:
        header += [f"{title_of(ALL[name].store)}, jobs/s", "claim of 100, ms"]
    rows = []
    for backlog in backlogs:
        kind, _, size = backlog.rpartition("_")
        row = [_KINDS[kind], f"{int(size):,}"]
        for figures in found.values():
            row += [figure(figures.get(backlog)), figure(figures.get(f"{backlog}_claim_ms"))]
        rows.append(row)
    return Table(header, rows)


def _dashboard_table(entries: dict[str, Entry]) -> Table:
    """A row for each page, with the milliseconds on each database."""
    found = {name: entry.medians() for name, entry in entries.items()}
    header = ["page", *(f"{title_of(ALL[name].store)}, ms" for name in found)]
    rows = [[page, *(figure(figures.get(page)) for figures in found.values())] for page in PAGES]
    return Table(header, rows)


_KINDS = {
    "none": "none",
    "scheduled": "scheduled for next month",
    "low": "pending, of lower priority",
    "completed": "completed",
    "paused": "in a paused queue",
}
assert _KINDS.keys() - {"none"} == BACKLOGS.keys()


def _machine_table(results: Results) -> Table:
    entries = [entry for of in results.entries.values() for entry in of.values()]
    runs = max((len(entry.runs) for entry in entries), default=0)
    facts = {**results.machine, "runs": str(runs), **results.versions}
    for name, reason in results.skipped.items():
        facts[f"{name}, not measured"] = reason
    return Table(["item", "value"], [[name, value] for name, value in facts.items()])
