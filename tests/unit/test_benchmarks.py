"""How the benchmarks calculate their figures."""

from __future__ import annotations

import struct

import pytest

from benchmarks import contenders
from benchmarks.figures import medians, percentile
from benchmarks.journal import Journal
from benchmarks.report import tables
from benchmarks.results import Results
from benchmarks.tables import Table, figure

_SECOND = 1_000_000_000


def _journal(*numbers: int) -> Journal:
    """A journal with one entry per second."""
    return Journal(tuple((number, at * _SECOND) for at, number in enumerate(numbers)))


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1), (0.5, 50), (0.95, 95), (0.99, 99), (0.991, 100), (1.0, 100)]
)
def test_percentile(share: float, expected: int) -> None:
    """A percentile is a measured value that the given share of values does not exceed."""
    assert percentile(list(range(100, 0, -1)), share) == expected


def test_percentile_of_few_values() -> None:
    """A single value is each of its percentiles; without values there is no percentile."""
    assert percentile([7.0], 0.99) == 7.0
    with pytest.raises(ValueError, match="no percentile"):
        percentile([], 0.5)


def test_medians() -> None:
    """Each figure has a median over the runs that have it; a curve has none."""
    runs = [{"a": 1.0, "b": 5.0}, {"a": 9.0, "curve": [(0, 1.0)]}, {"a": 2.0, "b": 7.0}]
    assert medians(runs) == {"a": 2.0, "b": 6.0}


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        ((2, 0, 1), None),
        ((0, 2), "1 jobs did not run, the first is 1"),
        ((0, 1, 2, 1), "1 jobs ran more than once, the first is 1"),
        ((0, 1, 2, 9), "1 jobs ran that were not enqueued, the first is 9"),
        ((), "3 jobs did not run, the first is 0"),
    ],
)
def test_journal_problems(numbers: tuple[int, ...], problem: str | None) -> None:
    """A run is valid only if each job ran exactly once, in any order."""
    assert _journal(*numbers).problem(range(3)) == problem


def test_journal_speed() -> None:
    """The speed is measured between the first and the last job."""
    assert _journal(0, 1, 2, 3, 4).per_second() == 1.0


def test_journal_without_backlog() -> None:
    """Jobs of a backlog are excluded by their number."""
    assert _journal(-1, 0, -1, 1).without(-1).problem(range(2)) is None


def test_incomplete_journal_entry_is_ignored() -> None:
    """An incomplete entry, which a killed worker may leave, is ignored."""
    data = struct.pack("=qqqq", 0, 10, 1, 20)
    assert Journal.parse(data + data[:5]).times() == {0: 10, 1: 20}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0, "0"),
        (0.012345, "0.0123"),
        (0.5, "0.500"),
        (9.999, "10.0"),
        (123.4, "123"),
        (19_386, "19,400"),
    ],
)
def test_figure_has_three_digits(value: float | None, text: str) -> None:
    """Figures have three digits, because more would suggest false precision."""
    assert figure(value) == text


def test_table_as_rst() -> None:
    """A table becomes one ``list-table``, with a dash for a missing figure."""
    assert Table(["queue", "jobs/s"], [["ours", "1,000"], ["theirs", ""]]).as_rst() == (
        ".. list-table::\n"
        "   :header-rows: 1\n"
        "\n"
        "   * - queue\n"
        "     - jobs/s\n"
        "   * - ours\n"
        "     - 1,000\n"
        "   * - theirs\n"
        "     - –\n"  # noqa: RUF001  # an en dash is intended
    )


def test_table_as_text() -> None:
    """On the terminal, figures are aligned to the right."""
    assert Table(["queue", "jobs/s"], [["ours", "1,000"], ["b", "5"]]).as_text() == (
        "queue  jobs/s\n"
        "ours    1,000\n"
        "b           5"
    )  # fmt: skip


def test_failed_run_is_shown_as_failed() -> None:
    """A contender that did not run all jobs is shown as failed, without its figures."""
    results = Results({}, {})
    entry = results.entry("throughput", "huey-sqlite")
    entry.runs.append({"jobs_per_second": 10_000.0})
    entry.failure = "1 jobs did not run, the first is 7"
    text = dict(tables(results))["throughput"].as_text()
    assert "failed" in text
    assert "10,000" not in text


def test_results_round_trip() -> None:
    """Results saved as JSON can be loaded again."""
    results = Results({"processors": "2"}, {"huey": "1"}, skipped={"rq": "not installed"})
    results.entry("latency", "huey-sqlite").runs.append({"p50_ms": 1.5})
    assert Results.from_json(results.as_json()) == results


def test_contender_names_are_unique() -> None:
    """No two contenders have the same name."""
    modules = (
        contenders.bgjobs,
        contenders.huey,
        contenders.pgqueuer,
        contenders.procrastinate,
        contenders.dramatiq,
        contenders.rq,
        contenders.celery,
    )
    assert len(contenders.ALL) == sum(len(module.CONTENDERS) for module in modules)
