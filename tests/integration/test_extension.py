"""``init_app``: the setup of an app, and the errors for invalid ones."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_bgjobs import BgJobs, ConfigError, DatabaseNotSupported, run_background_job
from flask_bgjobs.state import state_of
from flask_bgjobs.store import make_store
from flask_bgjobs.testing import drain


def _app(url: str = "sqlite://", **config: Any) -> Flask:
    app = Flask("wired")
    app.config.update(SQLALCHEMY_DATABASE_URI=url, **config)
    return app


def test_missing_flask_sqlalchemy_is_refused() -> None:
    """For an app without Flask-SQLAlchemy, the error names the missing call."""
    with pytest.raises(ConfigError, match=r"db\.init_app\(app\) before"):
        BgJobs(Flask("bare"))


def test_second_init_app_is_refused() -> None:
    """An app cannot be set up twice."""
    app = _app()
    SQLAlchemy().init_app(app)
    bgjobs = BgJobs(app)
    with pytest.raises(ConfigError, match="already set up"):
        bgjobs.init_app(app)
    with pytest.raises(ConfigError, match="already set up"):
        BgJobs(app)


def test_db_of_another_app_is_refused() -> None:
    """A ``db`` that was not initialized for the app is refused."""
    app = _app()
    SQLAlchemy().init_app(app)
    with pytest.raises(ConfigError, match="is not the one of the app"):
        BgJobs(app, SQLAlchemy())


def test_given_db_is_used() -> None:
    """``BgJobs(app, db)`` uses the app's ``db``."""
    app, db = _app(), SQLAlchemy()
    db.init_app(app)
    BgJobs(app, db)
    assert state_of(app).db is db


def test_init_app_does_not_connect(tmp_path: Any) -> None:
    """``init_app`` does not connect to the database, so its file is not created."""
    path = tmp_path / "none.db"
    app = _app(f"sqlite:///{path}")
    SQLAlchemy().init_app(app)
    BgJobs(app)
    assert not path.exists()


def test_invalid_value_stops_init_app() -> None:
    """For an invalid value, the error gives the key, the value and the valid values; the app is not
    set up."""
    app = _app(BGJOBS_CONCURRENCY=0)
    SQLAlchemy().init_app(app)
    with pytest.raises(ConfigError, match=r"BGJOBS_CONCURRENCY = 0: must be a whole number"):
        BgJobs(app)
    assert "bgjobs" not in app.extensions


def test_unknown_key_warns() -> None:
    """For an unknown key, the warning suggests a similar key."""
    app = _app(BGJOBS_RETIRES=3)
    SQLAlchemy().init_app(app)
    with pytest.warns(UserWarning, match="did you mean BGJOBS_RETRIES"):
        BgJobs(app)


def test_unknown_bind_is_refused() -> None:
    """A bind key that the app does not have is refused."""
    app = _app(BGJOBS_BIND_KEY="jobs")
    SQLAlchemy().init_app(app)
    with pytest.raises(ConfigError, match="BGJOBS_BIND_KEY"):
        BgJobs(app)


def test_unsupported_database_is_refused() -> None:
    """The error for an unsupported database contains its name."""
    engine = sa.create_mock_engine("oracle://", lambda *args: None)
    with pytest.raises(DatabaseNotSupported, match="oracle"):
        make_store(engine, object(), schema=None, max_crashes=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("postgresql+asyncpg://u@127.0.0.1/x", "postgresql+psycopg://… or postgresql+psycopg2://…"),
        ("postgresql+psycopg_async://u@127.0.0.1/x", "postgresql+psycopg://…"),
        ("postgresql+pg8000://u@127.0.0.1/x", "postgresql+psycopg://…"),
        ("sqlite+aiosqlite:///x.db", "sqlite:///… or sqlite+pysqlcipher://…"),
        ("mysql+mysqldb://root@127.0.0.1/x", "mysql+pymysql://…"),
        ("mysql+aiomysql://root@127.0.0.1/x", "mysql+pymysql://…"),
        ("mariadb+mariadbconnector://root@127.0.0.1/x", "mariadb+pymysql://…"),
    ],
)
def test_unsupported_driver_is_refused(url: str, advice: str) -> None:
    """For an unsupported driver, the app is not set up, and the error says what to write."""
    # Any module works, because nothing connects.
    app = _app(
        url,
        SQLALCHEMY_ENGINE_OPTIONS={
            "module": MagicMock(version="1.31.6", sqlite_version_info=(3, 45))
        },
    )
    SQLAlchemy().init_app(app)
    with pytest.raises(DatabaseNotSupported, match=re.escape(advice)):
        BgJobs(app)


def test_several_apps_on_one_db(tmp_path: Any) -> None:
    """Two apps with one ``db`` and one ``BgJobs`` keep their jobs separate."""
    db, bgjobs = SQLAlchemy(), BgJobs()
    apps = [_app(f"sqlite:///{tmp_path / name}") for name in ("a.db", "b.db")]

    @bgjobs.job(name="twice")
    def twice(number: int) -> int:
        return number * 2

    for app in apps:
        db.init_app(app)
        bgjobs.init_app(app)
        with app.app_context():
            db.create_all()
    with apps[0].app_context():
        twice.enqueue(1)
    assert [outcome.result for outcome in drain(apps[0])] == [2]
    assert drain(apps[1]) == []
    for app in apps:
        with app.app_context():
            state_of(app).store.dispose()
            db.engine.dispose()


def test_nothing_depends_on_debug(make_app: Callable[..., Flask]) -> None:
    """The configuration is the same in debug mode."""
    assert state_of(make_app()).config == state_of(make_app(DEBUG=True)).config


def test_dashboard_can_be_turned_off(make_app: Callable[..., Flask]) -> None:
    """With ``BGJOBS_DASHBOARD = False``, there is no blueprint."""
    assert "bgjobs" not in make_app(BGJOBS_DASHBOARD=False).blueprints
    assert "bgjobs" in make_app(BGJOBS_DASHBOARD=True).blueprints


@pytest.mark.slow
def test_web_process_does_not_import_apscheduler() -> None:
    """Setting up an app and enqueueing a job does not import APScheduler."""
    code = """
import sys
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_bgjobs import BgJobs, run_background_job
app = Flask("web")
app.config.update(SQLALCHEMY_DATABASE_URI="sqlite://", BGJOBS_ALLOWED_JOBS=["tests.jobs.echo"])
db = SQLAlchemy(app)
BgJobs(app)
with app.app_context():
    db.create_all()
    run_background_job("tests.jobs.echo")
loaded = [name for name in sys.modules if name.startswith("apscheduler")]
assert not loaded, loaded
assert "flask_bgjobs.worker.worker" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_exported() -> None:
    """The package exports every public name."""
    import flask_bgjobs

    names = [
        "BgJobs",
        "run_background_job",
        "current_job",
        "Job",
        "JobStatus",
        "Retry",
        "Snooze",
        "Fail",
        "JobCancelled",
        "JobTimeout",
        "job_enqueued",
        "job_started",
        "job_completed",
        "job_retrying",
        "job_failed",
        "job_cancelled",
        "job_rescued",
        "worker_started",
        "worker_stopped",
    ]
    for name in names:
        assert hasattr(flask_bgjobs, name), name
        assert name in flask_bgjobs.__all__


def test_setting_up_gives_no_warning() -> None:
    """Setting up a plain app and enqueueing a job gives no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        app = _app(BGJOBS_ALLOWED_CLASSES=["tests.jobs.SampleJob"])
        db = SQLAlchemy(app)
        BgJobs(app)
        with app.app_context():
            db.create_all()
            run_background_job("tests.jobs.SampleJob", "execute")
            db.session.commit()
