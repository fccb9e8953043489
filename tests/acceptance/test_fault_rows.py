"""Unusual jobs, rows and parameters, with a real worker that has both pools."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import Job
from flask_bgjobs.models import Attempt
from flask_bgjobs.state import AppState, state_of
from tests import databases
from tests.acceptance.conftest import Workers
from tests.acceptance.helpers import enqueue, lines
from tests.apps import build_app
from tests.conftest import DEADLINE_SECONDS, stored, wait_until

pytestmark = pytest.mark.acceptance
POOLS = {"default": "thread", "children": "process"}
"""The pool of each queue."""
BOTH_POOLS = {"BGJOBS_QUEUE_POOLS": {"children": "process"}, "BGJOBS_APP": "host:create_app"}


@dataclasses.dataclass
class Site:
    """An app and its worker, shared by all tests of this module."""

    app: Flask
    state: AppState
    folder: Path
    url: str
    worker: Any

    def log(self) -> str:
        """The worker's log, with all line breaks unchanged."""
        return self.worker.log.read_bytes().decode()

    def has_line(self, *parts: str) -> bool:
        """Whether a line of the log contains all ``parts``."""
        return any(all(part in line for part in parts) for line in self.log().splitlines())


@pytest.fixture(scope="module", params=databases.KINDS)
def module_site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A worker with both pools."""
    missing = request.config.missing_servers  # type: ignore[attr-defined]
    if request.param in missing:
        pytest.skip(missing[request.param])
    folder = tmp_path_factory.mktemp("site")
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(databases.new_database(request.param, folder))
        app = build_app(url)
        state = state_of(app)
        with app.app_context():
            app.extensions["sqlalchemy"].create_all()
            app.extensions["sqlalchemy"].engine.dispose()
        stack.callback(state.store.dispose)
        workers = Workers(folder, url)
        stack.callback(workers.end)
        worker = workers.start("-c", "4", "-q", ",".join(POOLS), **BOTH_POOLS)
        yield Site(app, state, folder, url, worker)
        worker.terminate()
        assert worker.wait(DEADLINE_SECONDS) == 0


@pytest.fixture
def site(module_site: Site) -> Iterator[Site]:
    """The app with its context pushed. Its worker must survive the test without an error."""
    with module_site.app.app_context():
        yield module_site
        for queue in POOLS:
            assert enqueue("echo", 1, queue=queue).wait(DEADLINE_SECONDS).result == 1
    assert module_site.worker.poll() is None
    for error in ("Database not usable", "refused by the database", "Worker dead", "crashed"):
        assert error not in module_site.log()


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """A file outside the database in which jobs record their runs."""
    return tmp_path / "journal"


def in_both_pools(name: str, *parameters: Any, **options: Any) -> list[Job]:
    return [enqueue(name, *parameters, queue=queue, **options) for queue in POOLS]


def execute(site: Site, statement: Any) -> None:
    site.state.store.transaction(lambda connection: connection.execute(statement))


def test_unstorable_result_fails_the_job(site: Site) -> None:
    """A result that is not JSON, not a finite number or too large fails the job at once, regardless
    of its retries, and the error names the value."""
    expected = {
        "an object": r"result\.rows\[1\].*object",
        "NaN": r"result\.rows\[1\].*nan",
        "infinity": r"result\.rows\[1\].*inf",
        "a surrogate": r"result\.rows\[1\].*surrogate",
        "too large": r"result.*1,048,576",
    }
    jobs = {
        case: in_both_pools("return_unstorable", case, retries=3, retry_delay=0)
        for case in expected
    }
    for case, pattern in expected.items():
        for job in jobs[case]:
            job.wait(DEADLINE_SECONDS)
            assert (job.status, job.attempt, job.retry_count) == ("failed", 1, 0)
            assert re.search(pattern, job.error or "", re.IGNORECASE), job.error


def test_every_exception_is_a_failure(site: Site) -> None:
    """Any exception that a job raises is a failure that uses a retry. Its text is made storable and
    truncated, and the process that ran the job survives."""
    expected = {
        "no text": r"Unreadable: \(its message cannot be read",
        "NUL and surrogates": r"ValueError: a\ufffdb\ufffdc",
        "50 MB": r"ValueError: beginx",
        "two arguments": r"TwoArguments: \(5, 'no'\)",
        "chain": r"RuntimeError: link 499",
        "exit": r"SystemExit: 3",
        "interrupt": r"KeyboardInterrupt",
        "generator": r"GeneratorExit",
        "cancelled": r"CancelledError",
        "bare": r"BaseException: bare",
    }
    jobs = {case: in_both_pools("throw", case, retries=1, retry_delay=0) for case in expected}
    for case, pattern in expected.items():
        for job in jobs[case]:
            job.wait(DEADLINE_SECONDS)
            assert (job.status, job.attempt, job.retry_count) == ("failed", 2, 1), case
            assert re.match(pattern, job.error or ""), job.error
            assert len(job.error or "") <= 2_000
    ids = [job.id for both in jobs.values() for job in both]
    with site.state.store.read() as connection:
        attempts = connection.execute(
            sa.select(Attempt.outcome, Attempt.traceback).where(Attempt.job_id.in_(ids))
        ).all()
    assert len(attempts) == 2 * 2 * len(expected)
    assert {row.outcome for row in attempts} == {"failed"}
    assert max(len(row.traceback) for row in attempts) <= 64 * 1024


@pytest.mark.parametrize("pool", POOLS.values())
def test_next_job_starts_with_a_clean_session(site: Site, tmp_path: Path, pool: str) -> None:
    """A transaction that a job leaves open or failed in the host's session is rolled back, and the
    next job in the same thread starts with a clean session."""
    workers = Workers(tmp_path, site.url)
    try:
        worker = workers.start("-q", "alone", "-P", pool, "-c", "1", BGJOBS_APP="host:create_app")
        locations = set()
        for how, status in (
            ("open", "completed"),
            ("broken", "failed"),
            ("swallowed", "completed"),
        ):
            spoiler = enqueue("spoil_session", how, retries=0, queue="alone")
            assert spoiler.wait(DEADLINE_SECONDS).status == status
            inspection = enqueue("inspect_session", queue="alone").wait(DEADLINE_SECONDS)
            process, thread, is_open, left = inspection.result
            assert (is_open, left) == (False, [])
            locations.add((process, thread))
        assert len(locations) == 1
        worker.terminate()
        assert worker.wait(DEADLINE_SECONDS) == 0
    finally:
        workers.end()


def test_job_with_a_deleted_row_is_stopped(site: Site, journal: Path) -> None:
    """If the row of a running job is deleted, its code is stopped, its outcome changes nothing and
    is logged as lost, and the other running jobs are not affected."""
    deleted = in_both_pools("hold", str(journal), 600)
    kept = in_both_pools("hold", str(journal), 1.0)
    wait_until(lambda: len(lines(journal)) >= 4, "the starts")
    execute(site, sa.delete(Job).where(Job.id.in_([job.id for job in deleted])))
    for job in deleted:
        wait_until(lambda job=job: site.has_line(f"Lease lost | Job: {job.id} |"), "the notice")
        assert site.state.store.get(job.id) is None
        assert f"stopped {job.id} JobCancelled" in lines(journal)
    for job in kept:
        assert job.wait(DEADLINE_SECONDS).status == "completed"
        assert job.attempt == 1


def test_row_with_a_forbidden_name_fails(site: Site) -> None:
    """A row that was changed to a private or malformed name fails without a retry. With a name that
    another release may have, it waits. The module is not imported."""
    imported = site.folder / "imported"
    (site.folder / "evil.py").write_text(
        f"open({str(imported)!r}, 'w').close()\ndef run(*_): pass\nclass Job:\n    run = run\n"
    )
    unknown = jobs_with_names(site, ("evil.run", None), ("evil.Job", "run"), ("os.system", None))
    refused_names = [("evil:run", None), ("evil._run", None), ("evil.Job", "__init__")]
    refused_names += [("tests.jobs.SampleJob", "_private"), ("tests.jobs.SampleJob.execute", None)]
    jobs = jobs_with_names(site, *refused_names)
    for job in unknown:
        wait_until(lambda job=job: job.refresh().status == "waiting", "the wait")
        assert (job.attempt, job.waits_for) == (1, "code")
    for job in jobs:
        job.wait(DEADLINE_SECONDS)
        assert (job.status, job.attempt, job.error_type) == ("failed", 1, "JobNotAllowed")
        refused = f"Unauthorized or invalid job class/method | Class: {job.target} |"
        wait_until(
            lambda job=job, line=refused: site.has_line(line, f"Job: {job.id} |"), "the line"
        )
    assert not imported.exists()


def jobs_with_names(site: Site, *names: tuple[str, str | None]) -> list[Job]:
    """Jobs that are due, and whose rows were changed to these targets and methods."""
    jobs = []
    for target, method in names:
        for job in in_both_pools("echo", "true", retries=3, delay=600):
            edited = {"target": target, "method": method, "run_at": job.created_at}
            execute(site, sa.update(Job).where(Job.id == job.id).values(**edited))
            jobs.append(job)
    return jobs


def test_parameters_cannot_forge_log_lines(site: Site) -> None:
    """Line breaks and control characters in parameters and errors do not reach the log: each event
    stays on one line."""
    text = "x\nINFO forged\r\n\x1b[2Jforged\u2028forged\x85\x0bforged"
    jobs = [*in_both_pools("echo", text), *in_both_pools("fail", text, retries=0)]
    for job in jobs:
        end = "Job completed" if job.wait(DEADLINE_SECONDS).status == "completed" else "Job failed"
        for stage in ("Job running", end):
            parts = (f"{stage} ", f"Job: {job.id} |", "forged")
            wait_until(lambda parts=parts: site.has_line(*parts), "the line")
    for line in site.log().splitlines():
        assert not re.search(r"[\x00-\x1f\x7f-\x9f]", line)
        assert not line.startswith(("INFO forged", "forged"))


def test_secrets_are_masked_in_log_and_errors(site: Site) -> None:
    """The value of a parameter whose name suggests a secret is masked in log lines, in the job's
    error, and in the output of ``flask bgjobs show``."""
    secret = "correct-horse-battery"
    for job in in_both_pools("login", "ann", secret, retries=1, retry_delay=0):
        assert job.wait(DEADLINE_SECONDS).status == "failed"
        for stage in ("Job running", "Job failed and will retry", "Job failed |"):
            parts = (stage, f"Job: {job.id} |")
            wait_until(lambda parts=parts: site.has_line(*parts), "the line")
        shown = site.app.test_cli_runner().invoke(args=["bgjobs", "show", str(job.id)])
        assert "ann could not log in" in shown.output
        assert secret not in shown.output
    assert site.has_line("Job failed |", "ann could not log in")
    assert secret not in site.log()


def test_long_job_does_not_delay_short_jobs(site: Site, journal: Path) -> None:
    """While each pool runs a long job, all short jobs complete."""
    slow = in_both_pools("hold", str(journal), 600)
    wait_until(lambda: len(lines(journal)) == 2, "the starts")
    quick = [job for number in range(30) for job in in_both_pools("echo", number)]
    for job in quick:
        assert job.wait(DEADLINE_SECONDS).status == "completed"
    assert [stored(site.app, job).status for job in slow] == ["running", "running"]
    for job in slow:
        job.cancel()
        assert job.wait(DEADLINE_SECONDS).status == "cancelled"
