"""The log lines of a job's stages."""

from __future__ import annotations

import datetime as dt
import importlib
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask

from flask_bgjobs import BgJobs, JobNotAllowed, signals
from flask_bgjobs.config import Config
from flask_bgjobs.job.records import JobSpec, Outcome, Settled
from flask_bgjobs.job.statuses import JobStatus, OutcomeKind
from flask_bgjobs.models import detached_job
from flask_bgjobs.observability import logs
from flask_bgjobs.registry import Registry
from flask_bgjobs.signals import emit, emit_settled
from flask_bgjobs.state import AppState
from tests.unit.helpers import make_spec

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
SECRET = "hunter2-and-more"

Written = Callable[[], logging.LogRecord]


@pytest.fixture
def written(caplog: pytest.LogCaptureFixture) -> Written:
    """Gives the one line that was written."""
    caplog.set_level(logging.INFO, logger="flask_bgjobs")

    def record() -> logging.LogRecord:
        (only,) = [record for record in caplog.records if record.name == "flask_bgjobs"]
        return only

    return record


@pytest.fixture(autouse=True)
def jobs(bgjobs: BgJobs, state: AppState) -> None:
    """Jobs whose parameters have names."""

    @bgjobs.job(name="shop.login")
    def login(user: object, password: object = None, *token: object, note: object = None) -> None:
        raise AssertionError("never called")


def spec(parameters: Any = ("Hello",), **changes: Any) -> JobSpec:
    given = parameters if isinstance(parameters, dict) else list(parameters)
    return make_spec(**{"target": "shop.login", "parameters": given, **changes})


def settled(job: JobSpec, status: JobStatus, error: str | None = None, **changes: Any) -> Settled:
    kind = changes.pop("kind", OutcomeKind.FAILED)
    outcome = Outcome(job.id, job.attempt, kind, error=error, run_seconds=0.0125)
    return Settled(job, outcome, status, **changes)


HEAD = r'Class: shop\.login \| Method: - \| Parameters: \["Hello"\] \| Attempt: 1 \| Job: 42'


def test_running(host: Flask, written: Written) -> None:
    """The start of a job is one line at INFO, in the documented form."""
    emit(signals.job_started, host, job=spec())
    record = written()
    assert record.levelname == "INFO"
    assert re.fullmatch(rf"Job running \| {HEAD} \| Timestamp: {TIME}", record.getMessage())


def test_method(host: Flask, written: Written) -> None:
    """The method of a class stands in its line."""
    emit(signals.job_started, host, job=spec({}, target="shop.jobs.SampleJob", method="execute"))
    assert "| Class: shop.jobs.SampleJob | Method: execute |" in written().getMessage()


def test_completed(host: Flask, written: Written) -> None:
    """The completion is one line at INFO, with its duration."""
    emit_settled(host, settled(spec(), JobStatus.COMPLETED))
    record = written()
    assert record.levelname == "INFO"
    assert re.fullmatch(
        rf"Job completed successfully \| {HEAD} \| Duration: 0\.01[23] s \| Timestamp: {TIME}",
        record.getMessage(),
    )


def test_retrying(host: Flask, written: Written) -> None:
    """A failure that will be retried is a WARNING with error, count and time of the retry."""
    job = settled(
        spec(), JobStatus.RETRYING, "ValueError: no", retry_count=1, delay_seconds=3_600.0
    )
    before = dt.datetime.now(dt.UTC).replace(microsecond=0)
    emit_settled(host, job)
    record = written()
    assert record.levelname == "WARNING"
    match = re.fullmatch(
        rf"Job failed and will retry \| {HEAD} \| Error: ValueError: no \| Retry: 1/3 \| "
        rf"Next run: ({TIME}) \| Timestamp: {TIME}",
        record.getMessage(),
    )
    assert match
    next_run = dt.datetime.fromisoformat(match[1]).replace(tzinfo=dt.UTC)
    assert dt.timedelta(0) <= next_run - before - dt.timedelta(hours=1) < dt.timedelta(minutes=1)


def test_failed(host: Flask, written: Written) -> None:
    """A final failure is an ERROR with error and retries used."""
    emit_settled(host, settled(spec(), JobStatus.FAILED, "ValueError: no", retry_count=3))
    record = written()
    assert record.levelname == "ERROR"
    assert re.fullmatch(
        rf"Job failed \| {HEAD} \| Error: ValueError: no \| Retry: 3/3 \| Timestamp: {TIME}",
        record.getMessage(),
    )


def test_refused_in_a_worker(host: Flask, written: Written) -> None:
    """A job that the worker's allow-list refuses is logged as that."""
    job = spec({}, target="os.system")
    emit_settled(
        host, settled(job, JobStatus.FAILED, "JobNotAllowed: no", kind=OutcomeKind.REFUSED)
    )
    record = written()
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith(
        "Unauthorized or invalid job class/method | Class: os.system | Method: - | "
    )


def test_refused_at_enqueue(host: Flask, written: Written) -> None:
    """A refusal at the enqueue is an ERROR that names what was asked for, and why not."""
    emit(
        signals.job_refused,
        host,
        target="os.system\nJob completed successfully",
        method=None,
        error=JobNotAllowed("'os.system' is not allowed"),
    )
    record = written()
    assert record.levelname == "ERROR"
    assert re.fullmatch(
        r"Unauthorized or invalid job class/method \| "
        r"Class: os\.system\\nJob completed successfully \| Method: (None|-) \| "
        rf"Error: 'os\.system' is not allowed \| Timestamp: {TIME}",
        record.getMessage(),
    )


def test_cancelled(host: Flask, written: Written) -> None:
    """A cancel is one line at INFO, of a running job and of a waiting one."""
    emit_settled(host, settled(spec(), JobStatus.CANCELLED, kind=OutcomeKind.CANCELLED))
    line = rf"Job cancelled \| {HEAD} \| Timestamp: {TIME}"
    assert re.fullmatch(line, written().getMessage())


def test_cancelled_while_waiting(host: Flask, written: Written) -> None:
    """The cancel of a waiting job, which is a ``Job``, has the same line."""
    waiting = detached_job(
        {
            "id": 42,
            "target": "shop.login",
            "method": None,
            "parameters_json": '["Hello"]',
            "attempt": 1,
            "status": "cancelled",
        }
    )
    emit(signals.job_cancelled, host, job=waiting)
    line = rf"Job cancelled \| {HEAD} \| Timestamp: {TIME}"
    assert re.fullmatch(line, written().getMessage())


def test_rescued(host: Flask, written: Written) -> None:
    """A rescue is a WARNING with what became of the job."""
    rescued = settled(spec(), JobStatus.PENDING, "the worker died", kind=OutcomeKind.LOST)
    emit(signals.job_rescued, host, job=rescued.spec, settled=rescued)
    record = written()
    assert record.levelname == "WARNING"
    assert "Job rescued | " in record.getMessage()
    assert "Error: the worker died | Status: pending | " in record.getMessage()


@pytest.mark.parametrize(
    ("signal", "stage"),
    [(signals.worker_started, "Worker started"), (signals.worker_stopped, "Worker stopped")],
)
def test_workers(signal: Any, stage: str, host: Flask, written: Written) -> None:
    """The start and the stop of a worker are logged with its name."""
    emit(signal, host, worker="host-1")
    assert re.fullmatch(rf"{stage} \| Worker: host-1 \| Timestamp: {TIME}", written().getMessage())


BREAKS = ["\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
CONTROLS = ["\x1b[2J\x1b[31m", "\0", "\b", "\x7f", "\x9b"]


@pytest.mark.parametrize("text", [*BREAKS, *CONTROLS], ids=ascii)
def test_one_line(text: str, host: Flask, written: Written) -> None:
    """Whatever parameters and errors hold, it stays one line without control characters."""
    evil = f"x{text}Job completed successfully | Class: forged"
    job = spec([evil, {evil: [evil]}], method=None)
    emit_settled(host, settled(job, JobStatus.FAILED, f"ValueError: {evil}"))
    line = written().getMessage()
    assert len(line.splitlines()) == 1
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in line)
    assert line.startswith("Job failed | Class: shop.login | ")


def test_other_characters_stay(host: Flask, written: Written) -> None:
    """Text in any script is readable in the log."""
    emit(signals.job_started, host, job=spec(["Grüße 世界 🎉 100 % %s {0}"]))
    assert '["Grüße 世界 🎉 100 % %s {0}"]' in written().getMessage()


def test_types_in_parameters(host: Flask, written: Written) -> None:
    """Dates and the like are shown as text, without the tags in which they are stored."""
    emit(signals.job_started, host, job=spec([dt.date(2026, 1, 2), None, (1, 2)]))
    line = written().getMessage()
    assert "2026-01-02" in line
    assert "__bgjobs__" not in line


@pytest.mark.parametrize(
    ("parameters", "shown"),
    [
        (["ann", SECRET], '["ann","***"]'),
        (["ann", None, SECRET, SECRET], '["ann","***","***","***"]'),
        ({"user": "ann", "password": SECRET}, '{"user":"ann","password":"***"}'),
        ([{"X-Api-Key": SECRET, "id": 1}], '[{"X-Api-Key":"***","id":1}]'),
        ({"user": [{"deep": {"apiKeyOld": SECRET}}]}, '{"user":[{"deep":{"apiKeyOld":"***"}}]}'),
    ],
)
def test_secrets(parameters: Any, shown: str, host: Flask, written: Written) -> None:
    """Secrets are masked in parameters, by key or by the name of the position, and in errors."""
    job = spec(parameters)
    emit_settled(host, settled(job, JobStatus.FAILED, f"ValueError: bad password {SECRET}!"))
    record = written()
    assert f"Parameters: {shown} | " in record.getMessage()
    assert "Error: ValueError: bad password ***! | " in record.getMessage()
    assert SECRET not in str(vars(record))


def test_secrets_in_a_retry(host: Flask, written: Written) -> None:
    """The line of a retry masks its error in the same way."""
    job = settled(spec(["ann", SECRET]), JobStatus.RETRYING, f"E: {SECRET}", delay_seconds=1.0)
    emit_settled(host, job)
    assert SECRET not in str(vars(written()))


def test_secrets_of_an_unknown_target(host: Flask, written: Written) -> None:
    """Of a job whose signature is not known, every positional value is masked."""
    job = spec(["ann", SECRET], target="gone.job")
    emit_settled(host, settled(job, JobStatus.FAILED, f"E: {SECRET}"))
    record = written()
    assert 'Parameters: ["***","***"] | ' in record.getMessage()
    assert SECRET not in str(vars(record))


def test_long_parameters(host: Flask, written: Written) -> None:
    """Long parameters are cut: the dashboard shows them whole."""
    emit(signals.job_started, host, job=spec(["x" * 1_000_000]))
    line = written().getMessage()
    assert len(line) < 3_000
    assert "xxx… | Attempt: 1" in line


@pytest.mark.parametrize("text", ["", "{", '[{"__bgjobs__":"pickle","v":1}]'])
def test_parameters_that_cannot_be_read(text: str, host: Flask, written: Written) -> None:
    """A job whose parameters are broken is logged all the same."""
    job = make_spec(target="shop.login", parameters_json=text)
    emit_settled(host, settled(job, JobStatus.FAILED, "ValueError: no"))
    line = written().getMessage()
    assert "Parameters: (not readable) | " in line
    assert "Error: ValueError: no | " in line


def test_extra_fields(host: Flask, written: Written) -> None:
    """The fields of a line stand in ``extra`` as well, for structured logs."""
    job = settled(spec(), JobStatus.RETRYING, "ValueError: a\nb", retry_count=1, delay_seconds=5.0)
    emit_settled(host, job)
    fields = {
        key.removeprefix("bgjobs_"): value
        for key, value in vars(written()).items()
        if key.startswith("bgjobs_")
    }
    assert fields.pop("stage") == "Job failed and will retry"
    assert re.fullmatch(TIME, str(fields.pop("timestamp")))
    assert re.fullmatch(TIME, str(fields.pop("next_run")))
    assert fields == {
        "class": "shop.login",
        "method": "-",
        "parameters": '["Hello"]',
        "attempt": 1,
        "job": 42,
        "error": "ValueError: a\nb",
        "retry": "1/3",
        "queue": "default",
    }


def test_quiet(host: Flask, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    """With INFO off, a start costs no formatting of parameters."""
    caplog.set_level(logging.WARNING, logger="flask_bgjobs")
    monkeypatch.setattr(logs, "_job_fields", lambda *args: pytest.fail("formatted for nothing"))
    emit(signals.job_started, host, job=spec())
    assert caplog.records == []


def test_connected_once(host: Flask, written: Written) -> None:
    """However many apps are set up, a stage is logged once."""
    logs.connect()
    logs.connect()
    emit(signals.job_started, host, job=spec())
    assert written().getMessage().startswith("Job running | ")


class TestNames:
    """Where the names of positional parameters come from."""

    def test_nothing_is_imported(
        self,
        host: Flask,
        state: AppState,
        written: Written,
        make_module: Callable[[str], str],
        was_imported: Callable[[str], bool],
    ) -> None:
        """A log line imports no module of jobs. Without the names all positional values are
        masked, in the error as well."""
        module = make_module("def login(user, password): ...")
        allowed = Config.from_mapping({"BGJOBS_ALLOWED_JOBS": [f"{module}.login"]}).allowed_jobs
        state.registry = Registry(allowed, {})
        job = spec(["ann", SECRET], target=f"{module}.login")
        emit_settled(host, settled(job, JobStatus.FAILED, f"ValueError: ann, {SECRET}"))
        line = written().getMessage()
        assert 'Parameters: ["***","***"]' in line
        assert "Error: ValueError: ***, ***" in line
        assert not was_imported(module)

    def test_the_outcome_brings_them(self, host: Flask, state: AppState, written: Written) -> None:
        """The names that the process which ran the job has told are used."""
        job = spec(["ann", SECRET, "x"], target="shop.elsewhere")
        failed = settled(job, JobStatus.FAILED, f"ValueError: ann, {SECRET}")
        outcome = failed.outcome._replace(parameter_names=("user", "*token"))
        emit_settled(host, failed._replace(outcome=outcome))
        line = written().getMessage()
        assert 'Parameters: ["ann","***","***"]' in line
        assert "Error: ValueError: ann, ***" in line

    def test_a_module_that_is_imported_is_looked_at(
        self, host: Flask, state: AppState, written: Written, make_module: Callable[[str], str]
    ) -> None:
        """The names of a job whose module has been imported already are known."""
        module = make_module("class Login:\n    def run(self, user, password): ...")
        importlib.import_module(module)
        allowed = Config.from_mapping({"BGJOBS_ALLOWED_JOBS": [f"{module}.Login"]}).allowed_jobs
        state.registry = Registry(allowed, {})
        emit(
            signals.job_started,
            host,
            job=spec(["ann", SECRET], target=f"{module}.Login", method="run"),
        )
        assert 'Parameters: ["ann","***"]' in written().getMessage()
