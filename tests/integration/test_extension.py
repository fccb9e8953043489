"""``init_app``: how the parts are wired, and what it refuses."""

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


def test_without_flask_sqlalchemy_it_says_what_to_call() -> None:
    """An app without Flask-SQLAlchemy is refused with the call that is missing."""
    with pytest.raises(ConfigError, match=r"db\.init_app\(app\) before"):
        BgJobs(Flask("bare"))


def test_a_second_init_app_is_refused() -> None:
    """Setting an app up twice is refused."""
    app = _app()
    SQLAlchemy().init_app(app)
    bgjobs = BgJobs(app)
    with pytest.raises(ConfigError, match="already set up"):
        bgjobs.init_app(app)
    with pytest.raises(ConfigError, match="already set up"):
        BgJobs(app)


def test_a_foreign_db_is_refused() -> None:
    """A ``db`` that is not the app's is refused."""
    app = _app()
    SQLAlchemy().init_app(app)
    with pytest.raises(ConfigError, match="is not the one of the app"):
        BgJobs(app, SQLAlchemy())


def test_a_given_db_is_taken() -> None:
    """``BgJobs(app, db)`` takes the app's own ``db``."""
    app, db = _app(), SQLAlchemy()
    db.init_app(app)
    BgJobs(app, db)
    assert state_of(app).db is db


def test_init_app_touches_no_database(tmp_path: Any) -> None:
    """``init_app`` connects to nothing: the file is not even made."""
    path = tmp_path / "none.db"
    app = _app(f"sqlite:///{path}")
    SQLAlchemy().init_app(app)
    BgJobs(app)
    assert not path.exists()


def test_a_bad_value_stops_init_app() -> None:
    """A bad value is refused with key, value and what is allowed; nothing is half set up."""
    app = _app(BGJOBS_CONCURRENCY=0)
    SQLAlchemy().init_app(app)
    with pytest.raises(ConfigError, match=r"BGJOBS_CONCURRENCY = 0: must be a whole number"):
        BgJobs(app)
    assert "bgjobs" not in app.extensions


def test_an_unknown_key_warns() -> None:
    """An unknown key is a warning that names the close one."""
    app = _app(BGJOBS_RETIRES=3)
    SQLAlchemy().init_app(app)
    with pytest.warns(UserWarning, match="did you mean BGJOBS_RETRIES"):
        BgJobs(app)


def test_an_unknown_bind_is_refused() -> None:
    """A bind key that the app does not have is refused."""
    app = _app(BGJOBS_BIND_KEY="jobs")
    SQLAlchemy().init_app(app)
    with pytest.raises(ConfigError, match="BGJOBS_BIND_KEY"):
        BgJobs(app)


def test_another_database_is_refused_with_its_name() -> None:
    """A database without a store is refused with its name."""
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
def test_another_driver_is_refused(url: str, advice: str) -> None:
    """A URL with another driver is refused when the app is set up, and says what to write."""
    # Any module will do: nothing is connected.
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
    """Two apps on one ``db`` and one ``BgJobs`` keep their jobs apart, tables made once."""
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


def test_without_dashboard_there_is_no_blueprint(make_app: Callable[..., Flask]) -> None:
    """``BGJOBS_DASHBOARD = False`` registers no address."""
    assert "bgjobs" not in make_app(BGJOBS_DASHBOARD=False).blueprints
    assert "bgjobs" in make_app(BGJOBS_DASHBOARD=True).blueprints


def test_a_web_process_imports_no_apscheduler() -> None:
    """Importing the package, setting an app up and enqueueing imports no APScheduler."""
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


def test_all_public_names_are_there() -> None:
    """Every name of the contract is exported."""
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
    """A plain app is set up without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        app = _app(BGJOBS_ALLOWED_CLASSES=["tests.jobs.SampleJob"])
        db = SQLAlchemy(app)
        BgJobs(app)
        with app.app_context():
            db.create_all()
            run_background_job("tests.jobs.SampleJob", "execute")
            db.session.commit()
