"""``current_job``, through which a running job reads its state and reports progress."""

from __future__ import annotations

import logging
import math
import threading
from typing import Any

import pytest

from flask_bgjobs import JobCancelled, current_job
from flask_bgjobs.execution import current as context
from flask_bgjobs.execution.current import CurrentJob
from flask_bgjobs.job.records import Report
from flask_bgjobs.job.serialize import NotSerializable, loads
from tests.unit.helpers import make_spec


@pytest.fixture
def job() -> CurrentJob:
    return CurrentJob(make_spec())


def take_lines(job: CurrentJob) -> tuple[str, ...]:
    report = job.take_report()
    assert report is not None
    return report.lines


def test_attributes() -> None:
    """A job can read its id, attempt, retry count and queue."""
    job = CurrentJob(make_spec(id=7, attempt=3, retry_count=2, queue="mail"))
    assert (job.id, job.attempt, job.retry_count, job.queue) == (7, 3, 2, "mail")


@pytest.mark.parametrize(
    ("fraction", "stored"),
    [(0, 0.0), (0.4, 0.4), (1, 1.0), (1.5, 1.0), (-3, 0.0), (math.inf, 1.0), (-math.inf, 0.0)],
)
def test_progress_is_clamped(job: CurrentJob, fraction: float, stored: float) -> None:
    """Progress outside the range from 0 to 1 is clamped."""
    job.progress(fraction)
    assert job.take_report() == Report(progress=stored)


@pytest.mark.parametrize("fraction", [math.nan, "nan", "half"])
def test_invalid_progress_is_refused(job: CurrentJob, fraction: Any) -> None:
    """Progress that is not a number is refused, and the earlier progress is kept."""
    job.progress(0.5, "half")
    with pytest.raises(ValueError):  # noqa: PT011 - the message comes from float()
        job.progress(fraction)
    assert job.take_report() == Report(0.5, "half")


def test_progress_note(job: CurrentJob) -> None:
    """The latest note is stored, shortened to its column; invalid characters are replaced."""
    job.progress(0.1, "first")
    job.progress(0.2, "a\0b\ud800" + "x" * 5_000)
    report = job.take_report()
    assert report is not None
    assert report.progress == 0.2
    assert report.progress_note is not None
    assert report.progress_note.startswith("a\ufffdb\ufffdxxx")
    assert len(report.progress_note) == 255


def test_progress_without_note_keeps_note(job: CurrentJob) -> None:
    """Progress without a note keeps the earlier note if it is not yet written."""
    job.progress(0.1, "loading")
    job.progress(0.2)
    assert job.take_report() == Report(0.2, "loading")


def test_log_lines_are_kept_in_order(job: CurrentJob, caplog: pytest.LogCaptureFixture) -> None:
    """Log lines are kept in order, and unstorable characters are replaced.

    They do not go to the logger, which masks nothing.
    """
    caplog.set_level(logging.DEBUG)
    job.log("first")
    job.log(42)
    job.log("a\0b")
    assert take_lines(job) == ("first", "42", "a\ufffdb")
    assert caplog.messages == []


def test_log_message_is_not_a_format_string(job: CurrentJob) -> None:
    """A percent sign in a log line is kept as it is."""
    job.log("100 %s %d %(name)s")
    assert take_lines(job) == ("100 %s %d %(name)s",)


def test_excess_lines_are_dropped(job: CurrentJob) -> None:
    """Between two reports, a thousand lines are kept; older lines are dropped and counted."""
    for number in range(3_500):
        job.log(f"line {number}")
    stored = take_lines(job)
    assert stored[0] == "(2,500 lines left out)"
    assert stored[1:] == tuple(f"line {number}" for number in range(2_500, 3_500))


def test_line_limit_applies_per_report(job: CurrentJob) -> None:
    """A thousand lines fit into each report."""
    for round_number in range(3):
        for number in range(1_000):
            job.log(f"{round_number} {number}")
        assert len(take_lines(job)) == 1_000


def test_report_has_only_changes(job: CurrentJob) -> None:
    """A report has the changes since the last one; without changes there is no report."""
    assert job.take_report() is None
    job.progress(0.5, "half")
    job.log("line")
    job.meta["step"] = 1
    report = job.take_report()
    assert report == Report(0.5, "half", '{"step":1}', ("line",))
    assert job.take_report() is None
    job.log("next")
    assert job.take_report() == Report(lines=("next",))


def test_meta_is_kept_between_attempts() -> None:
    """``meta`` starts with the values of the previous attempt, and is written only if changed."""
    job = CurrentJob(make_spec(meta_json='{"seen":[1]}'))
    assert job.meta == {"seen": [1]}
    assert job.take_report() is None
    job.meta["seen"].append(2)
    assert job.take_report() == Report(meta_json='{"seen":[1,2]}')
    assert job.take_report() is None


def test_cleared_meta_is_reported() -> None:
    """Clearing ``meta`` is a change too."""
    job = CurrentJob(make_spec(meta_json='{"a":1}'))
    job.meta.clear()
    assert job.take_report() == Report(meta_json="{}")


@pytest.mark.parametrize(
    "value",
    [object(), math.nan, "\ud800", "x" * 200],
    ids=["object", "nan", "surrogate", "large"],
)
def test_unstorable_meta(value: object) -> None:
    """Unstorable ``meta`` does not hold up the rest of a report; ``check_meta`` refuses it."""
    job = CurrentJob(make_spec(), max_payload=100)
    job.meta["bad"] = value
    job.log("still reported")
    assert job.take_report() == Report(lines=("still reported",))
    with pytest.raises(NotSerializable, match=r"^current_job\.meta"):
        job.check_meta()
    job.meta["bad"] = 1
    job.check_meta()
    assert job.take_report() == Report(meta_json='{"bad":1}')


def test_cancel_request(job: CurrentJob) -> None:
    """A cancel request sets ``cancelled``, and ``raise_if_cancelled`` raises."""
    assert job.cancelled is False
    job.raise_if_cancelled()
    job.request_cancel()
    assert job.cancelled is True
    with pytest.raises(JobCancelled):
        job.raise_if_cancelled()


def test_current_job_outside_a_job() -> None:
    """Outside a job, ``current_job`` raises a ``RuntimeError`` that says where it is available."""
    with pytest.raises(RuntimeError, match="only available inside a job"):
        _ = current_job.id
    assert not current_job
    assert "unbound" in repr(current_job)


def test_nested_current_job(job: CurrentJob) -> None:
    """``current_job`` is the job entered last, until it is left."""
    other = CurrentJob(make_spec(id=7))
    token = context.enter(job)
    assert current_job.id == 42
    inner = context.enter(other)
    assert current_job.id == 7
    context.leave(inner)
    assert current_job.id == 42
    context.leave(token)
    assert not current_job


def test_current_job_is_per_thread(job: CurrentJob) -> None:
    """Another thread does not see this thread's job."""
    seen: list[bool] = []
    token = context.enter(job)
    try:
        thread = threading.Thread(target=lambda: seen.append(bool(current_job)))
        thread.start()
        thread.join(30)
    finally:
        context.leave(token)
    assert seen == [False]


def test_reports_during_logging(job: CurrentJob) -> None:
    """No line is lost or repeated if reports are taken while the job writes lines."""
    total = 20_000
    taken_lines: list[str] = []
    done = threading.Event()

    def write_lines() -> None:
        for number in range(total):
            job.log(str(number))
            job.meta[str(number % 50)] = number
        done.set()

    thread = threading.Thread(target=write_lines, daemon=True)
    thread.start()
    dropped = 0
    finished = False
    while not finished:
        finished = done.is_set()
        report = job.take_report()
        for line in report.lines if report else ():
            if line.endswith("lines left out)"):
                dropped += int(line.split()[0].strip("(").replace(",", ""))
            else:
                taken_lines.append(line)
        assert report is None or report.meta_json is None or loads(report.meta_json)
    thread.join(30)
    assert len(taken_lines) + dropped == total
    assert taken_lines == sorted(taken_lines, key=int)
    assert len(set(taken_lines)) == len(taken_lines)


class FailingValue:
    """A value whose methods raise."""

    __hash__ = object.__hash__

    def __eq__(self, _other: object) -> bool:
        raise RuntimeError("no session")

    def __repr__(self) -> str:
        raise RuntimeError("no session")


@pytest.mark.parametrize("in_meta", [True, False])
def test_failing_meta_does_not_stop_reports(job: CurrentJob, in_meta: bool) -> None:
    """If ``meta`` raises when it is read, reports still work; ``check_meta`` refuses it."""
    if in_meta:
        job.meta["rows"] = {FailingValue(), FailingValue()}
    else:
        job.meta = FailingValue()  # type: ignore[assignment]
    assert job.take_report() is None
    with pytest.raises(NotSerializable):
        job.check_meta()


def test_progress_above_one_is_logged(job: CurrentJob, caplog: pytest.LogCaptureFixture) -> None:
    """Progress above 1 causes one warning, because other queues count to 100."""
    for step in (40, 50, 100):
        job.progress(step)
    (message,) = caplog.messages
    assert message == "Progress is a fraction from 0 to 1 | Job: 42 | Given: 40"


@pytest.mark.parametrize("fraction", [0, 0.5, 1])
def test_valid_progress_is_not_logged(
    job: CurrentJob, fraction: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Progress from 0 to 1 causes no warning."""
    job.progress(fraction)
    assert caplog.messages == []
