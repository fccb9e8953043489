"""The log lines for the stages of a job."""

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

LoggedRecord = Callable[[], logging.LogRecord]


@pytest.fixture
def logged_record(caplog: pytest.LogCaptureFixture) -> LoggedRecord:
    """Returns the only record that the library has logged."""
    caplog.set_level(logging.INFO, logger="flask_bgjobs")

    def record() -> logging.LogRecord:
        (only,) = [record for record in caplog.records if record.name == "flask_bgjobs"]
        return only

    return record


@pytest.fixture(autouse=True)
def jobs(bgjobs: BgJobs, state: AppState) -> None:
    """A job function with named parameters."""

    @bgjobs.job(name="shop.login")
    def login(user: object, password: object = None, *token: object, note: object = None) -> None:
        raise AssertionError("never called")


def spec(parameters: Any = ("Hello",), **changes: Any) -> JobSpec:
    stored = parameters if isinstance(parameters, dict) else list(parameters)
    return make_spec(**{"target": "shop.login", "parameters": stored, **changes})


def settled(job: JobSpec, status: JobStatus, error: str | None = None, **changes: Any) -> Settled:
    kind = changes.pop("kind", OutcomeKind.FAILED)
    outcome = Outcome(job.id, job.attempt, kind, error=error, run_seconds=0.0125)
    return Settled(job, outcome, status, **changes)


HEAD = r'Class: shop\.login \| Method: - \| Parameters: \["Hello"\] \| Attempt: 1 \| Job: 42'


def test_running_line(host: Flask, logged_record: LoggedRecord) -> None:
    """The start of a job is one line at INFO, in the documented format."""
    emit(signals.job_started, host, job=spec())
    record = logged_record()
    assert record.levelname == "INFO"
    assert re.fullmatch(rf"Job running \| {HEAD} \| Timestamp: {TIME}", record.getMessage())


def test_method_is_logged(host: Flask, logged_record: LoggedRecord) -> None:
    """The line of a class job names its method."""
    emit(signals.job_started, host, job=spec({}, target="shop.jobs.SampleJob", method="execute"))
    assert "| Class: shop.jobs.SampleJob | Method: execute |" in logged_record().getMessage()


def test_completed_line(host: Flask, logged_record: LoggedRecord) -> None:
    """A completed job is one line at INFO, with its duration."""
    emit_settled(host, settled(spec(), JobStatus.COMPLETED))
    record = logged_record()
    assert record.levelname == "INFO"
    assert re.fullmatch(
        rf"Job completed successfully \| {HEAD} \| Duration: 0\.01[23] s \| Timestamp: {TIME}",
        record.getMessage(),
    )


def test_retrying_line(host: Flask, logged_record: LoggedRecord) -> None:
    """A failure to be retried is a WARNING with the error, retry count and next run time."""
    job = settled(
        spec(), JobStatus.RETRYING, "ValueError: no", retry_count=1, delay_seconds=3_600.0
    )
    before = dt.datetime.now(dt.UTC).replace(microsecond=0)
    emit_settled(host, job)
    record = logged_record()
    assert record.levelname == "WARNING"
    match = re.fullmatch(
        rf"Job failed and will retry \| {HEAD} \| Error: ValueError: no \| Retry: 1/3 \| "
        rf"Next run: ({TIME}) \| Timestamp: {TIME}",
        record.getMessage(),
    )
    assert match
    next_run = dt.datetime.fromisoformat(match[1]).replace(tzinfo=dt.UTC)
    assert dt.timedelta(0) <= next_run - before - dt.timedelta(hours=1) < dt.timedelta(minutes=1)


def test_failed_line(host: Flask, logged_record: LoggedRecord) -> None:
    """A final failure is an ERROR with the error and the retries used."""
    emit_settled(host, settled(spec(), JobStatus.FAILED, "ValueError: no", retry_count=3))
    record = logged_record()
    assert record.levelname == "ERROR"
    assert re.fullmatch(
        rf"Job failed \| {HEAD} \| Error: ValueError: no \| Retry: 3/3 \| Timestamp: {TIME}",
        record.getMessage(),
    )


def test_refused_in_worker(host: Flask, logged_record: LoggedRecord) -> None:
    """A job refused by the worker's allow-list has its own message."""
    job = spec({}, target="os.system")
    emit_settled(
        host, settled(job, JobStatus.FAILED, "JobNotAllowed: no", kind=OutcomeKind.REFUSED)
    )
    record = logged_record()
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith(
        "Unauthorized or invalid job class/method | Class: os.system | Method: - | "
    )


def test_refused_when_enqueued(host: Flask, logged_record: LoggedRecord) -> None:
    """A refused enqueue is an ERROR with the requested name and the reason."""
    emit(
        signals.job_refused,
        host,
        target="os.system\nJob completed successfully",
        method=None,
        error=JobNotAllowed("'os.system' is not allowed"),
    )
    record = logged_record()
    assert record.levelname == "ERROR"
    assert re.fullmatch(
        r"Unauthorized or invalid job class/method \| "
        r"Class: os\.system\\nJob completed successfully \| Method: (None|-) \| "
        rf"Error: 'os\.system' is not allowed \| Timestamp: {TIME}",
        record.getMessage(),
    )


def test_cancelled_line(host: Flask, logged_record: LoggedRecord) -> None:
    """A cancelled running job is one line at INFO."""
    emit_settled(host, settled(spec(), JobStatus.CANCELLED, kind=OutcomeKind.CANCELLED))
    line = rf"Job cancelled \| {HEAD} \| Timestamp: {TIME}"
    assert re.fullmatch(line, logged_record().getMessage())


def test_cancelled_waiting_job(host: Flask, logged_record: LoggedRecord) -> None:
    """A cancelled waiting job, which is a ``Job``, has the same line."""
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
    assert re.fullmatch(line, logged_record().getMessage())


def test_rescued_line(host: Flask, logged_record: LoggedRecord) -> None:
    """A rescued job is a WARNING with its new status."""
    rescued = settled(spec(), JobStatus.PENDING, "the worker died", kind=OutcomeKind.LOST)
    emit(signals.job_rescued, host, job=rescued.spec, settled=rescued)
    record = logged_record()
    assert record.levelname == "WARNING"
    assert "Job rescued | " in record.getMessage()
    assert "Error: the worker died | Status: pending | " in record.getMessage()


@pytest.mark.parametrize(
    ("signal", "stage"),
    [(signals.worker_started, "Worker started"), (signals.worker_stopped, "Worker stopped")],
)
def test_worker_lines(signal: Any, stage: str, host: Flask, logged_record: LoggedRecord) -> None:
    """The start and stop of a worker are logged with its name."""
    emit(signal, host, worker="host-1")
    assert re.fullmatch(
        rf"{stage} \| Worker: host-1 \| Timestamp: {TIME}", logged_record().getMessage()
    )


LINE_BREAKS = ["\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
CONTROL_CHARACTERS = ["\x1b[2J\x1b[31m", "\0", "\b", "\x7f", "\x9b"]


@pytest.mark.parametrize("text", [*LINE_BREAKS, *CONTROL_CHARACTERS], ids=ascii)
def test_record_is_one_line(text: str, host: Flask, logged_record: LoggedRecord) -> None:
    """Parameters and errors cannot add line breaks or control characters."""
    forged = f"x{text}Job completed successfully | Class: forged"
    job = spec([forged, {forged: [forged]}], method=None)
    emit_settled(host, settled(job, JobStatus.FAILED, f"ValueError: {forged}"))
    line = logged_record().getMessage()
    assert len(line.splitlines()) == 1
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in line)
    assert line.startswith("Job failed | Class: shop.login | ")


def test_readable_characters_are_kept(host: Flask, logged_record: LoggedRecord) -> None:
    """Text in any script stays readable."""
    emit(signals.job_started, host, job=spec(["Grüße 世界 🎉 100 % %s {0}"]))
    assert '["Grüße 世界 🎉 100 % %s {0}"]' in logged_record().getMessage()


def test_parameters_without_type_tags(host: Flask, logged_record: LoggedRecord) -> None:
    """Dates and other types are shown as text, without the tags used for storage."""
    emit(signals.job_started, host, job=spec([dt.date(2026, 1, 2), None, (1, 2)]))
    line = logged_record().getMessage()
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
def test_secrets_are_masked(
    parameters: Any, shown: str, host: Flask, logged_record: LoggedRecord
) -> None:
    """Secrets are masked in errors and in parameters, by key or by parameter name."""
    job = spec(parameters)
    emit_settled(host, settled(job, JobStatus.FAILED, f"ValueError: bad password {SECRET}!"))
    record = logged_record()
    assert f"Parameters: {shown} | " in record.getMessage()
    assert "Error: ValueError: bad password ***! | " in record.getMessage()
    assert SECRET not in str(vars(record))


def test_secrets_in_retry_line(host: Flask, logged_record: LoggedRecord) -> None:
    """The error in the line of a retry is masked too."""
    job = settled(spec(["ann", SECRET]), JobStatus.RETRYING, f"E: {SECRET}", delay_seconds=1.0)
    emit_settled(host, job)
    assert SECRET not in str(vars(logged_record()))


def test_unknown_target_masks_all_values(host: Flask, logged_record: LoggedRecord) -> None:
    """If the job's signature is unknown, every positional value is masked."""
    job = spec(["ann", SECRET], target="gone.job")
    emit_settled(host, settled(job, JobStatus.FAILED, f"E: {SECRET}"))
    record = logged_record()
    assert 'Parameters: ["***","***"] | ' in record.getMessage()
    assert SECRET not in str(vars(record))


def test_long_parameters_are_shortened(host: Flask, logged_record: LoggedRecord) -> None:
    """Long parameters are shortened; the dashboard shows them in full."""
    emit(signals.job_started, host, job=spec(["x" * 1_000_000]))
    line = logged_record().getMessage()
    assert len(line) < 3_000
    assert "xxx… | Attempt: 1" in line


@pytest.mark.parametrize("text", ["", "{", '[{"__bgjobs__":"pickle","v":1}]'])
def test_unreadable_parameters(text: str, host: Flask, logged_record: LoggedRecord) -> None:
    """A job with corrupt parameters is still logged."""
    job = make_spec(target="shop.login", parameters_json=text)
    emit_settled(host, settled(job, JobStatus.FAILED, "ValueError: no"))
    line = logged_record().getMessage()
    assert "Parameters: (not readable) | " in line
    assert "Error: ValueError: no | " in line


def test_extra_fields(host: Flask, logged_record: LoggedRecord) -> None:
    """The fields of a line are also in ``extra``, for structured logs."""
    job = settled(spec(), JobStatus.RETRYING, "ValueError: a\nb", retry_count=1, delay_seconds=5.0)
    emit_settled(host, job)
    fields = {
        key.removeprefix("bgjobs_"): value
        for key, value in vars(logged_record()).items()
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


def test_disabled_level_formats_nothing(
    host: Flask, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    """With INFO off, the parameters of a started job are not formatted."""
    caplog.set_level(logging.WARNING, logger="flask_bgjobs")
    monkeypatch.setattr(
        logs, "_job_fields", lambda *args: pytest.fail("formatted although INFO is off")
    )
    emit(signals.job_started, host, job=spec())
    assert caplog.records == []


def test_connect_twice_logs_once(host: Flask, logged_record: LoggedRecord) -> None:
    """Each stage is logged once, even if several apps are set up."""
    logs.connect()
    logs.connect()
    emit(signals.job_started, host, job=spec())
    assert logged_record().getMessage().startswith("Job running | ")


class TestParameterNames:
    """Where the names of positional parameters come from."""

    def test_job_module_is_not_imported(
        self,
        host: Flask,
        state: AppState,
        logged_record: LoggedRecord,
        make_module: Callable[[str], str],
        was_imported: Callable[[str], bool],
    ) -> None:
        """A log line does not import the job's module.

        Without parameter names, all positional values are masked, in the error too.
        """
        module = make_module("def login(user, password): ...")
        allowed = Config.from_mapping({"BGJOBS_ALLOWED_JOBS": [f"{module}.login"]}).allowed_jobs
        state.registry = Registry(allowed, {})
        job = spec(["ann", SECRET], target=f"{module}.login")
        emit_settled(host, settled(job, JobStatus.FAILED, f"ValueError: ann, {SECRET}"))
        line = logged_record().getMessage()
        assert 'Parameters: ["***","***"]' in line
        assert "Error: ValueError: ***, ***" in line
        assert not was_imported(module)

    def test_names_from_outcome(
        self, host: Flask, state: AppState, logged_record: LoggedRecord
    ) -> None:
        """The names recorded in the outcome by the process that ran the job are used."""
        job = spec(["ann", SECRET, "x"], target="shop.elsewhere")
        failed = settled(job, JobStatus.FAILED, f"ValueError: ann, {SECRET}")
        outcome = failed.outcome._replace(parameter_names=("user", "*token"))
        emit_settled(host, failed._replace(outcome=outcome))
        line = logged_record().getMessage()
        assert 'Parameters: ["ann","***","***"]' in line
        assert "Error: ValueError: ann, ***" in line

    def test_names_from_imported_module(
        self,
        host: Flask,
        state: AppState,
        logged_record: LoggedRecord,
        make_module: Callable[[str], str],
    ) -> None:
        """If the job's module is already imported, its signature is used."""
        module = make_module("class Login:\n    def run(self, user, password): ...")
        importlib.import_module(module)
        allowed = Config.from_mapping({"BGJOBS_ALLOWED_JOBS": [f"{module}.Login"]}).allowed_jobs
        state.registry = Registry(allowed, {})
        emit(
            signals.job_started,
            host,
            job=spec(["ann", SECRET], target=f"{module}.Login", method="run"),
        )
        assert 'Parameters: ["ann","***"]' in logged_record().getMessage()
