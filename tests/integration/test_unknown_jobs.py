"""Jobs that a worker's code does not have: they wait for a worker that has them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import Job, JobStatus, WaitTimeout, run_background_job
from flask_bgjobs.config import Config
from flask_bgjobs.flow.unknown_jobs import UnknownJobs
from flask_bgjobs.models import Attempt
from flask_bgjobs.options import NO_OPTIONS
from flask_bgjobs.registry import Decorated, Registry
from flask_bgjobs.state import AppState
from flask_bgjobs.store import MAX_NAMES, CodeWait
from flask_bgjobs.worker.options import WorkerOptions
from flask_bgjobs.worker.worker import Worker
from tests.conftest import stored, wait_until
from tests.integration.test_unique import pass_time
from tests.integration.test_worker import running_worker

NEW = "shop.jobs.new"
DAY = 86_400


def deploy(state: AppState, *decorated: str, allowed: Any = ("tests.jobs.echo",)) -> None:
    """Give the app the code of a release with these decorated functions and this allow-list."""
    config = Config.from_mapping({"BGJOBS_ALLOWED_JOBS": allowed})
    functions = {name: Decorated(lambda: "done", NO_OPTIONS) for name in decorated}
    state.registry = Registry(config.allowed_jobs, functions)


def enqueue_new(state: AppState, number: int = 1, **options: Any) -> list[Job]:
    """Enqueue jobs with a release that has them, then go back to the older one."""
    deploy(state, NEW)
    jobs = [run_background_job(NEW, **options) for _ in range(number)]
    deploy(state)
    return jobs


def run_burst(state: AppState, **options: Any) -> None:
    Worker(state, WorkerOptions(burst=True, concurrency=1, **options)).run()


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [record.getMessage() for record in caplog.records]
    return [line for line in lines if line.startswith("Job waits for code")]


def edit(state: AppState, job: Job, **values: Any) -> None:
    change = sa.update(Job).where(Job.id == job.id).values(**values)
    state.store.transaction(lambda connection: connection.execute(change))


def with_names(
    state: AppState, names: Sequence[tuple[str, str | None]]
) -> dict[tuple[str, str | None], Job]:
    """Jobs whose rows were edited to these targets and methods."""
    jobs = {name: run_background_job("tests.jobs.echo") for name in names}
    for (target, method), job in jobs.items():
        edit(state, job, target=target, method=method)
    return jobs


class TestWaiting:
    def test_unknown_job_waits_and_runs_with_the_next_release(
        self, app: Flask, state: AppState, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A worker gives a job that it does not have back; a worker that has it runs it."""
        first, second = enqueue_new(state, 2, retries=0)
        known = run_background_job("tests.jobs.echo", parameters=[1], priority=-1)
        run_burst(state)
        waiting = stored(app, first)
        assert (waiting.status, waiting.waits_for) == (JobStatus.WAITING, "code")
        assert (waiting.attempt, waiting.retry_count, waiting.error) == (1, 0, None)
        assert stored(app, second).status == "waiting"
        assert stored(app, known).status == "completed"
        with state.store.read() as connection:
            assert connection.scalar(sa.select(sa.func.count()).select_from(Attempt)) == 0
        (warning,) = warnings_in(caplog)
        assert f"Class: {NEW} | Method: - | Job: {first.id} | Reason: " in warning
        assert warning.endswith(
            "this worker has not imported shop.jobs: import it in the app factory or name it in "
            "BGJOBS_IMPORTS, or the release that has it is not deployed here"
        )
        assert "shop.jobs" not in sys.modules
        deploy(state, NEW)
        run_burst(state)
        for job in (first, second):
            done = stored(app, job)
            assert (done.status, done.result, done.waits_for) == ("completed", "done", None)
            assert (done.attempt, done.waiting_since is None) == (2, False)

    def test_worker_frees_at_its_start_and_in_sweeps(self, app: Flask, state: AppState) -> None:
        """A live worker runs jobs that began to wait after its start."""
        (early,) = enqueue_new(state)
        run_burst(state)
        deploy(state, NEW)
        with running_worker(app):
            wait_until(lambda: stored(app, early).status == "completed", "the early job")
            late = run_background_job(NEW)
            edit(state, late, status="waiting", waits_for="code", waiting_on=NEW)
            edit(state, late, waiting_since=state.store.now)
            wait_until(lambda: stored(app, late).status == "completed", "the late job")

    def test_many_jobs_do_not_wait_for_a_sweep_each(self, make_app: Callable[..., Flask]) -> None:
        """A sweep frees a hundred jobs; an idle worker goes on until none is left."""
        app = make_app(BGJOBS_HEARTBEAT_INTERVAL=600, BGJOBS_LEASE=3600)
        state: AppState = app.extensions["bgjobs"]
        with app.app_context():
            jobs = enqueue_new(state, 250)
        values = {"status": "waiting", "waits_for": "code", "waiting_on": NEW}
        change = sa.update(Job).values(**values, waiting_since=state.store.now)
        state.store.transaction(lambda connection: connection.execute(change))
        deploy(state, NEW)
        with running_worker(app, concurrency=2):
            wait_until(lambda: stored(app, jobs[-1]).status == "completed", "the last job")
        assert {stored(app, job).status for job in jobs} == {"completed"}

    def test_only_served_queues_are_freed(self, app: Flask, state: AppState) -> None:
        """A worker leaves the jobs of queues that it does not serve."""
        (job,) = enqueue_new(state, queue="mail")
        run_burst(state)
        deploy(state, NEW)
        run_burst(state, queues=["default"])
        assert stored(app, job).status == "waiting"
        run_burst(state, queues=["default", "mail"])
        assert stored(app, job).status == "completed"

    def test_worker_does_not_free_what_its_children_lack(self, app: Flask, state: AppState) -> None:
        """A job that a pool of the worker has given back is left to other workers."""
        (job,) = enqueue_new(state)
        worker = Worker(state, WorkerOptions(burst=True, concurrency=1))
        worker.run()
        deploy(state, NEW)
        assert worker._unknown_jobs.free(10) == 0
        assert UnknownJobs(state, state.store, "other", None).free(10) == 1
        assert stored(app, job).status == "pending"

    @pytest.mark.on("sqlite")
    def test_draining_worker_frees_nothing(self, app: Flask, state: AppState) -> None:
        """A draining worker leaves waiting jobs to others."""
        (job,) = enqueue_new(state)
        run_burst(state)
        deploy(state, NEW)
        worker = Worker(state, WorkerOptions(burst=True, concurrency=1))
        worker._is_draining = True
        worker._free_waiting(10)
        assert stored(app, job).status == "waiting"


class TestTimeout:
    def test_job_fails_as_refused_after_the_timeout(
        self, app: Flask, state: AppState, caplog: pytest.LogCaptureFixture
    ) -> None:
        """After a day without a worker that has it, the job is refused and reported."""
        calls: list[tuple[int, bool]] = []
        state.failure_hooks = [lambda job, error, final: calls.append((job.id, final))]
        (job,) = enqueue_new(state, retries=5)
        run_burst(state)
        pass_time(state, DAY - 60)
        run_burst(state)
        assert stored(app, job).status == "waiting"
        pass_time(state, 120)
        run_burst(state)
        failed = stored(app, job)
        assert (failed.status, failed.retry_count, failed.error_type) == (
            "failed",
            0,
            "JobNotAllowed",
        )
        assert "No worker had its code within 1 d (BGJOBS_UNKNOWN_TIMEOUT)" in str(failed.error)
        assert "Unauthorized or invalid job class/method" in caplog.text
        assert calls == [(job.id, True)]
        with state.store.read() as connection:
            outcomes = connection.scalars(sa.select(Attempt.outcome)).all()
        assert outcomes == ["refused"]

    def test_job_that_is_known_after_the_timeout_runs(self, app: Flask, state: AppState) -> None:
        """A worker that has the job runs it, however long it has waited."""
        (job,) = enqueue_new(state)
        run_burst(state)
        pass_time(state, 30 * DAY)
        deploy(state, NEW)
        run_burst(state)
        assert stored(app, job).status == "completed"

    def test_time_adds_up_until_the_code_starts(self, app: Flask, state: AppState) -> None:
        """The time of a job that is freed and given back again is counted from the first time;
        a job that has run since waits anew."""
        (job,) = enqueue_new(state, retry_delay=3600)
        run_burst(state)
        since = stored(app, job).waiting_since
        assert state.store.free(CodeWait("default", NEW, 0), 10) == 1
        run_burst(state)
        assert (stored(app, job).status, stored(app, job).waiting_since) == ("waiting", since)

        def fail() -> None:
            raise ValueError

        state.registry = Registry({}, {NEW: Decorated(fail, NO_OPTIONS)})
        run_burst(state)
        assert (stored(app, job).status, stored(app, job).waiting_since) == ("retrying", None)

    def test_failed_job_waits_anew_after_a_retry_by_hand(self, app: Flask, state: AppState) -> None:
        """A retry by hand begins another wait."""
        (job,) = enqueue_new(state)
        run_burst(state)
        pass_time(state, 2 * DAY)
        run_burst(state)
        assert stored(app, job).status == "failed"
        state.store.retry([job.id])
        run_burst(state)
        assert stored(app, job).status == "waiting"
        state.cancel([job.id])
        pass_time(state, 2 * DAY)
        state.store.retry([job.id])
        run_burst(state)
        assert stored(app, job).status == "waiting"

    def test_fail_refuses_at_once(self, make_app: Callable[..., Flask]) -> None:
        """With ``BGJOBS_UNKNOWN_JOBS = "fail"`` a job does not wait, and one that waits already
        fails."""
        app = make_app()
        state: AppState = app.extensions["bgjobs"]
        with app.app_context():
            (old,) = enqueue_new(state)
        run_burst(state)
        strict = make_app(BGJOBS_UNKNOWN_JOBS="fail")
        state = strict.extensions["bgjobs"]
        with strict.app_context():
            (new,) = enqueue_new(state)
        run_burst(state)
        assert [stored(strict, job).status for job in (old, new)] == ["failed", "failed"]
        assert "BGJOBS_UNKNOWN_TIMEOUT" not in str(stored(strict, new).error)
        with strict.app_context():
            missing = run_background_job("tests.jobs.echo")
        edit(state, missing, target="tests.later.send")
        deploy(state, allowed=["tests.later.send"])
        run_burst(state)
        failed = stored(strict, missing)
        assert (failed.status, failed.error_type) == ("failed", "InvalidJob")


OF_NO_RELEASE = [
    ("shop.jobs._private", None),
    ("shop.__init__.run", None),
    ("_shop.jobs.run", None),
    ("os._exit", None),
    ("shop.jobs:run", None),
    ("shop.jobs.run ", None),
    ("shop.jobs.run()", None),
    ("shop..run", None),
    ("shop.jobs.class", None),
    ("shop.jobs.\uff52un", None),
    ("", None),
    ("x" * 256, None),
    ("tests.jobs.SampleJob.execute", None),
    ("tests.jobs.SampleJob.execute.again", None),
    ("tests.jobs.SampleJob", "_private"),
    ("tests.jobs.SampleJob", "__init__"),
    ("tests.jobs.SampleJob", "mro"),
    ("tests.jobs.SampleJob", "attribute"),
    ("tests.jobs.SampleJob", "execute.again"),
    ("tests.jobs.SampleJob", None),
    ("tests.jobs.echo", "execute"),
]
OF_ANOTHER_RELEASE = [
    ("os.system", None),
    ("send", None),
    ("tests.jobs.sent", None),
    ("tests.jobs.SampleJobs", "execute"),
    ("tests.jobs.SampleJob", "archive"),
    ("tests.process_jobs.Report", "archive"),
    ("tests.jobs.later", None),
    ("tests.later.send", None),
    ("later.send", None),
    ("отчёты.продажи", None),
]
ALLOWED = {
    "tests.jobs.echo": None,
    "tests.jobs.SampleJob": None,
    "tests.process_jobs.Report": ["execute"],
    **dict.fromkeys(("tests.jobs.later", "tests.later.send", "later.send")),
}


@pytest.mark.on("sqlite")
class TestNames:
    def test_name_of_no_release_fails_at_once(self, app: Flask, state: AppState) -> None:
        """A job whose name is malformed or private, or goes on to an attribute, does not wait."""
        jobs = with_names(state, OF_NO_RELEASE)
        run_burst(state)
        ended = {name: stored(app, job) for name, job in jobs.items()}
        assert {name: (job.status, job.attempt) for name, job in ended.items()} == dict.fromkeys(
            OF_NO_RELEASE, ("failed", 1)
        )

    def test_name_that_another_release_may_have_waits(
        self, app: Flask, state: AppState, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A job waits for a function, a class, a method or an entry of the allow-list that only
        another release has."""
        jobs = with_names(state, OF_ANOTHER_RELEASE)
        deploy(state, allowed=ALLOWED)
        run_burst(state)
        waiting = {name: stored(app, job) for name, job in jobs.items()}
        assert {name: (job.status, job.attempt) for name, job in waiting.items()} == dict.fromkeys(
            OF_ANOTHER_RELEASE, ("waiting", 1)
        )
        found = {(wait.target, wait.method) for wait in state.store.code_waits()}
        assert found == set(OF_ANOTHER_RELEASE)
        warnings = warnings_in(caplog)
        assert len(warnings) == len(OF_ANOTHER_RELEASE)
        assert all("the release that has it is not deployed here" in line for line in warnings)

    def test_broken_module_fails_at_once(
        self, app: Flask, state: AppState, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A module that exists, but cannot import another one, is an error of this release."""
        (tmp_path / "broken_shop.py").write_text("import no_such_library")
        monkeypatch.syspath_prepend(tmp_path)
        job = run_background_job("tests.jobs.echo")
        edit(state, job, target="broken_shop.send")
        deploy(state, allowed=["broken_shop.send"])
        run_burst(state)
        assert stored(app, job).status == "failed"
        assert "no_such_library" in str(stored(app, job).error)

    def test_name_beneath_that_of_a_decorated_function(self, app: Flask, state: AppState) -> None:
        """A decorated function has no attributes that are jobs; its ``name=`` may be the beginning
        of another name."""
        job = run_background_job("tests.jobs.echo")
        for own_name, status in (("orders", "waiting"), (f"{__name__}._more", "failed")):
            function = Decorated(_more, NO_OPTIONS)
            state.registry = Registry({}, {own_name: function})
            edit(state, job, status="pending", target=f"{own_name}.sync", waits_for=None)
            run_burst(state)
            assert stored(app, job).status == status

    def test_warning_for_each_name(
        self, app: Flask, state: AppState, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A worker warns once for each name, not for each job."""
        deploy(state, "shop.a", "shop.b")
        for name in ("shop.a", "shop.b", "shop.a"):
            run_background_job(name)
        deploy(state)
        run_burst(state)
        classes = [line.split(" | ")[2] for line in warnings_in(caplog)]
        assert classes == ["Class: shop.a", "Class: shop.b"]


def _more() -> None:
    """A decorated function."""


class TestOtherMoves:
    def test_waiting_job_is_cancelled_deleted_or_expires(self, app: Flask, state: AppState) -> None:
        """A waiting job can be cancelled and deleted, but not retried, and it expires."""
        cancelled, deleted, expired = enqueue_new(state, 3, expires=3600)
        run_burst(state)
        assert state.store.retry([cancelled.id]).skipped == {cancelled.id: "it is waiting"}
        assert state.cancel([cancelled.id]).done == [cancelled.id]
        assert state.store.delete([deleted.id]).done == [deleted.id]
        pass_time(state, 4000)
        run_burst(state)
        assert stored(app, cancelled).status == "cancelled"
        ended = stored(app, expired)
        assert (ended.status, ended.error_type, ended.waits_for) == ("cancelled", "Expired", None)
        assert state.store.code_waits() == []

    def test_waiting_job_keeps_its_key(self, app: Flask, state: AppState) -> None:
        """A waiting job holds its unique key until it ends."""
        (job,) = enqueue_new(state, unique_key="k")
        run_burst(state)
        deploy(state, NEW)
        assert run_background_job(NEW, unique_key="k").id == job.id
        state.cancel([job.id])
        assert run_background_job(NEW, unique_key="k").id != job.id

    @pytest.mark.on("sqlite")
    def test_wait_names_the_code(self, app: Flask, state: AppState) -> None:
        """The error of ``job.wait()`` says that the code is missing."""
        (job,) = enqueue_new(state)
        run_burst(state)
        with pytest.raises(WaitTimeout, match=rf"still waiting .* with {NEW} in its code"):
            job.wait(0.01)


class TestStatements:
    def test_job_after_many_unknown_names(self, app: Flask, state: AppState) -> None:
        """However many names wait that nobody has, a worker gets to those that it has."""
        deploy(state, NEW)
        job = run_background_job(NEW)
        values = {"status": "waiting", "waits_for": "code", "waiting_on": NEW}
        edit(state, job, **values, waiting_since=state.store.now)
        row = {**values, "target": "shop.forged", "method": None}
        with state.store.read() as connection:
            stored_row = connection.execute(sa.select(Job.__table__)).one()._mapping
        forged = [
            {**stored_row, **row, "id": None, "waiting_on": f"shop.a{number}"}
            for number in range(MAX_NAMES + 10)
        ]
        for each in forged:
            del each["id"]
        insert = sa.insert(Job.__table__)
        state.store.transaction(lambda connection: connection.execute(insert, forged))
        unknown = UnknownJobs(state, state.store, "w", None)
        assert [unknown.free(10), unknown.free(10)] == [0, 1]
        assert stored(app, job).status == "pending"
        assert unknown.free(10) == 0

    def test_names_by_queue(self, app: Flask, state: AppState) -> None:
        """Each name is listed once for each queue, with the time of its first job."""
        for queue in ("b", "a"):
            for name in (NEW, "shop.jobs.other"):
                deploy(state, name)
                for _ in range(3):
                    run_background_job(name, queue=queue)
        deploy(state)
        run_burst(state)
        pass_time(state, 100)
        for values in ({"waiting_on": None}, {"waiting_since": None}):
            edited = run_background_job("tests.jobs.echo", queue="a")
            usual = {"waiting_on": "a", "waiting_since": state.store.now}
            edit(state, edited, status="waiting", waits_for="code", **usual | values)
        waits = state.store.code_waits()
        names = [(wait.queue, wait.name) for wait in waits]
        assert names == [(q, n) for q in ("a", "b") for n in (NEW, "shop.jobs.other")]
        assert all(99 < wait.seconds < 200 for wait in waits)
        for position in range(len(waits)):
            following = state.store.code_waits(after=waits[position])
            assert [(w.queue, w.name) for w in following] == names[position + 1 :]
        assert state.store.count_waiting(waits[0], 10) == 3
        assert state.store.count_waiting(waits[0], 2) == 2

    def test_longest_waiting_jobs_are_freed_first(self, app: Flask, state: AppState) -> None:
        """``free`` takes the jobs that have waited longest, up to its limit, and skips others."""
        jobs = enqueue_new(state, 4)
        run_burst(state)
        for job, seconds in zip(jobs, (10, 40, 20, 30), strict=True):
            edit(state, job, waiting_since=state.store.after(sa.literal(float(-seconds))))
        wait = CodeWait("default", NEW, 0)
        assert state.store.free(wait, 10, min_seconds=35) == 1
        assert state.store.free(wait, 2) == 2
        statuses = [stored(app, job).status for job in jobs]
        assert statuses == ["waiting", "pending", "pending", "pending"]

    def test_statements_read_the_index(self, app: Flask, state: AppState) -> None:
        """The names and the jobs of a name are found by index seeks, however many others wait."""
        from tests.integration.test_store import analyze, plans, scans

        enqueue_new(state, 3)
        run_burst(state)
        _copy_jobs(state, doublings=11)
        analyze(state.store)
        wait = CodeWait("default", NEW, 0)
        plan = plans(state.store, lambda: _look_and_free(state, wait))
        assert "ix_bgjobs_job_waits" in plan
        assert not scans(plan)


def _look_and_free(state: AppState, wait: CodeWait) -> None:
    state.store.code_waits()
    state.store.free(wait, 10)


def _copy_jobs(state: AppState, *, doublings: int) -> None:
    """Double the number of jobs several times."""
    table = Job.__table__
    columns: Sequence[Any] = [c for c in table.columns if c.name != "id"]
    copied = sa.insert(table).from_select([c.name for c in columns], sa.select(*columns))
    for _ in range(doublings):
        state.store.transaction(lambda connection: connection.execute(copied))
