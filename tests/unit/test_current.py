"""``current_job``: what running code may ask and tell."""

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


def lines(job: CurrentJob) -> tuple[str, ...]:
    report = job.take_report()
    assert report is not None
    return report.lines


def test_what_it_is() -> None:
    """Running code sees id, attempt, retry count and queue of its own attempt."""
    job = CurrentJob(make_spec(id=7, attempt=3, retry_count=2, queue="mail"))
    assert (job.id, job.attempt, job.retry_count, job.queue) == (7, 3, 2, "mail")


@pytest.mark.parametrize(
    ("fraction", "kept"),
    [(0, 0.0), (0.4, 0.4), (1, 1.0), (1.5, 1.0), (-3, 0.0), (math.inf, 1.0), (-math.inf, 0.0)],
)
def test_progress(job: CurrentJob, fraction: float, kept: float) -> None:
    """Progress is a number from 0 to 1; what lies outside is cut to that."""
    job.progress(fraction)
    assert job.take_report() == Report(progress=kept)


@pytest.mark.parametrize("fraction", [math.nan, "nan", "half"])
def test_progress_that_is_no_number(job: CurrentJob, fraction: Any) -> None:
    """Progress that is no number is refused, and what was told before stays."""
    job.progress(0.5, "half")
    with pytest.raises(ValueError):  # noqa: PT011 - float() words its own
        job.progress(fraction)
    assert job.take_report() == Report(0.5, "half")


def test_progress_note(job: CurrentJob) -> None:
    """A note is made storable and cut to what its column holds; the newest counts."""
    job.progress(0.1, "first")
    job.progress(0.2, "a\0b\ud800" + "x" * 5_000)
    report = job.take_report()
    assert report is not None
    assert report.progress == 0.2
    assert report.progress_note is not None
    assert report.progress_note.startswith("a\ufffdb\ufffdxxx")
    assert len(report.progress_note) == 255


def test_progress_without_note_keeps_it(job: CurrentJob) -> None:
    """Progress without a note does not wipe out one that was not written yet."""
    job.progress(0.1, "loading")
    job.progress(0.2)
    assert job.take_report() == Report(0.2, "loading")


def test_log(job: CurrentJob, caplog: pytest.LogCaptureFixture) -> None:
    """Lines are kept in order and made storable; the logger, which masks nothing, gets none."""
    caplog.set_level(logging.DEBUG)
    job.log("first")
    job.log(42)
    job.log("a\0b")
    assert lines(job) == ("first", "42", "a\ufffdb")
    assert caplog.messages == []


def test_log_message_is_no_pattern(job: CurrentJob) -> None:
    """A percent sign in a line is a percent sign."""
    job.log("100 %s %d %(name)s")
    assert lines(job) == ("100 %s %d %(name)s",)


def test_too_many_lines(job: CurrentJob) -> None:
    """A thousand lines are kept between two writes; older ones are dropped and counted."""
    for number in range(3_500):
        job.log(f"line {number}")
    kept = lines(job)
    assert kept[0] == "(2,500 lines left out)"
    assert kept[1:] == tuple(f"line {number}" for number in range(2_500, 3_500))


def test_exactly_a_thousand_lines(job: CurrentJob) -> None:
    """A thousand lines are not too many, and the count starts anew with each report."""
    for round_number in range(3):
        for number in range(1_000):
            job.log(f"{round_number} {number}")
        assert len(lines(job)) == 1_000


def test_report_only_of_news(job: CurrentJob) -> None:
    """A report holds what is new since the last one, and there is none when nothing is."""
    assert job.take_report() is None
    job.progress(0.5, "half")
    job.log("line")
    job.meta["step"] = 1
    report = job.take_report()
    assert report == Report(0.5, "half", '{"step":1}', ("line",))
    assert job.take_report() is None
    job.log("next")
    assert job.take_report() == Report(lines=("next",))


def test_meta_over_attempts() -> None:
    """Meta begins as an earlier attempt left it, and is written only when it changed."""
    job = CurrentJob(make_spec(meta_json='{"seen":[1]}'))
    assert job.meta == {"seen": [1]}
    assert job.take_report() is None
    job.meta["seen"].append(2)
    assert job.take_report() == Report(meta_json='{"seen":[1,2]}')
    assert job.take_report() is None


def test_meta_emptied() -> None:
    """Meta that was emptied is news as well."""
    job = CurrentJob(make_spec(meta_json='{"a":1}'))
    job.meta.clear()
    assert job.take_report() == Report(meta_json="{}")


@pytest.mark.parametrize(
    "value",
    [object(), math.nan, "\ud800", "x" * 200],
    ids=["object", "nan", "surrogate", "large"],
)
def test_meta_that_cannot_be_stored(value: object) -> None:
    """Meta that cannot be stored keeps nothing else from being told; the end refuses it."""
    job = CurrentJob(make_spec(), max_payload=100)
    job.meta["bad"] = value
    job.log("still told")
    assert job.take_report() == Report(lines=("still told",))
    with pytest.raises(NotSerializable, match=r"^current_job\.meta"):
        job.check_meta()
    job.meta["bad"] = 1
    job.check_meta()
    assert job.take_report() == Report(meta_json='{"bad":1}')


def test_cancelled(job: CurrentJob) -> None:
    """A cancel that somebody asked for is seen, and stops the code where it wants to."""
    assert job.cancelled is False
    job.raise_if_cancelled()
    job.request_cancel()
    assert job.cancelled is True
    with pytest.raises(JobCancelled):
        job.raise_if_cancelled()


def test_no_current_job() -> None:
    """Outside a job, ``current_job`` is a ``RuntimeError`` that says where it is there."""
    with pytest.raises(RuntimeError, match="only available inside a job"):
        _ = current_job.id
    assert not current_job
    assert "unbound" in repr(current_job)


def test_current_job_inside(job: CurrentJob) -> None:
    """Between enter and leave it is the job, nested ones included, and no longer after."""
    other = CurrentJob(make_spec(id=7))
    token = context.enter(job)
    assert current_job.id == 42
    inner = context.enter(other)
    assert current_job.id == 7
    context.leave(inner)
    assert current_job.id == 42
    context.leave(token)
    assert not current_job


def test_each_thread_has_its_own(job: CurrentJob) -> None:
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


def test_told_and_taken_at_once(job: CurrentJob) -> None:
    """No line is lost or told twice when it is taken while the code goes on telling."""
    total = 20_000
    taken: list[str] = []
    done = threading.Event()

    def tell() -> None:
        for number in range(total):
            job.log(str(number))
            job.meta[str(number % 50)] = number
        done.set()

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    left_out = 0
    finished = False
    while not finished:
        finished = done.is_set()
        report = job.take_report()
        for line in report.lines if report else ():
            if line.endswith("lines left out)"):
                left_out += int(line.split()[0].strip("(").replace(",", ""))
            else:
                taken.append(line)
        assert report is None or report.meta_json is None or loads(report.meta_json)
    thread.join(30)
    assert len(taken) + left_out == total
    assert taken == sorted(taken, key=int)
    assert len(set(taken)) == len(taken)


class Raises:
    """A value whose every method raises."""

    __hash__ = object.__hash__

    def __eq__(self, _other: object) -> bool:
        raise RuntimeError("no session")

    def __repr__(self) -> str:
        raise RuntimeError("no session")


@pytest.mark.parametrize("in_meta", [True, False])
def test_meta_that_raises_is_no_concern_of_the_worker(job: CurrentJob, in_meta: bool) -> None:
    """Whatever a job puts into ``meta``, a report can be taken; the attempt's end refuses it."""
    if in_meta:
        job.meta["rows"] = {Raises(), Raises()}
    else:
        job.meta = Raises()  # type: ignore[assignment]
    assert job.take_report() is None
    with pytest.raises(NotSerializable):
        job.check_meta()


def test_progress_that_is_no_fraction_is_told(
    job: CurrentJob, caplog: pytest.LogCaptureFixture
) -> None:
    """Other queues count to 100: what would show as done at once is a warning, once."""
    for step in (40, 50, 100):
        job.progress(step)
    (told,) = caplog.messages
    assert told == "Progress is a fraction from 0 to 1 | Job: 42 | Given: 40"


@pytest.mark.parametrize("fraction", [0, 0.5, 1])
def test_a_fraction_is_not(
    job: CurrentJob, fraction: float, caplog: pytest.LogCaptureFixture
) -> None:
    """The ends of the range are part of it."""
    job.progress(fraction)
    assert caplog.messages == []
