"""An encrypted SQLite file, with the driver for SQLCipher."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import run_background_job
from flask_bgjobs.state import state_of
from flask_bgjobs.worker.options import WorkerOptions
from flask_bgjobs.worker.worker import Worker
from tests.apps import build_app, create_tables


def _encrypted_app(file: Path, key: str = "secret", **config: Any) -> Flask:
    url = f"sqlite+pysqlcipher://:{key}@/{file}"
    config = {"BGJOBS_DASHBOARD": True, "BGJOBS_DASHBOARD_PUBLIC": True, **config}
    options = {"poolclass": sa.QueuePool}
    return build_app(url, **{"SQLALCHEMY_ENGINE_OPTIONS": options, **config})


def test_jobs_run_in_an_encrypted_file(tmp_path: Path) -> None:
    """In an encrypted file, jobs are enqueued, run in several threads, retried, listed and
    cancelled."""
    file = tmp_path / "encrypted.db"
    app = _encrypted_app(file)
    create_tables(app)
    with app.app_context():
        worker = Worker(state_of(app), WorkerOptions(concurrency=4))
        thread = threading.Thread(target=worker.run)
        thread.start()
        try:
            jobs = [
                run_background_job("tests.jobs.echo", parameters=[number]) for number in range(20)
            ]
            failing = run_background_job("tests.jobs.fail", retries=1)
            late = run_background_job("tests.jobs.echo", parameters=[0], delay=3_600)
            late.cancel()
            assert [job.wait(30).result for job in jobs] == list(range(20))
            failing.wait(30)
        finally:
            worker.stop()
            thread.join(30)
        assert (failing.status, failing.attempt, late.refresh().status) == (
            "failed",
            2,
            "cancelled",
        )
        listed = app.test_client().get("/jobs/api/v1/jobs?status=failed").json
        assert [job["id"] for job in listed["jobs"]] == [failing.id]
    assert not file.read_bytes().startswith(b"SQLite format 3")


def test_wrong_key_is_reported(tmp_path: Path) -> None:
    """If the file is opened with a wrong key, the command says so in one sentence."""
    file = tmp_path / "encrypted.db"
    create_tables(_encrypted_app(file))
    result = _encrypted_app(file, "guess").test_cli_runner().invoke(args=["bgjobs", "list"])
    assert result.exit_code == 1
    assert "encrypted with another key" in result.output
    assert "Traceback" not in result.output


def test_default_pool_warns(tmp_path: Path) -> None:
    """SQLAlchemy's default pool for SQLCipher gives a warning, because its threads close each
    other's connections."""
    with pytest.warns(UserWarning, match="QueuePool"):
        _encrypted_app(tmp_path / "x.db", SQLALCHEMY_ENGINE_OPTIONS={})
