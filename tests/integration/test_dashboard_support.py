"""A host app with the dashboard, shared by the tests of the dashboard."""

from __future__ import annotations

import datetime as dt
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import flask
import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient

from flask_bgjobs.extension import BgJobs
from flask_bgjobs.job.statuses import FINAL
from flask_bgjobs.job.turns import claim_rank
from flask_bgjobs.models import Attempt, Job, JobLog, Queue, Worker
from tests.apps import create_tables, new_database
from tests.prepared_databases import PreparedDatabases

SAMPLE = f"{__name__}.SampleJob"
RECEIPT = f"{__name__}.send_receipt"
BROKEN = f"{__name__}.no_such_thing"
PREFIX = "/jobs"
SECTIONS = ("/errors", "/queues", "/workers", "/schedules", "/audit")
"""The pages that the navigation of the dashboard links to, without the overview and the list."""

MakeHost = Callable[..., "Host"]


class SampleJob:
    """An allowed class with one method."""

    def execute(self, message: str, times: int = 1) -> str:
        return message * times


def send_receipt(order_id: int, password: str | None = None) -> None:
    """An allowed function with a parameter that is masked."""


@pytest.fixture(name="make_host")
def host_maker(tmp_path: pathlib.Path, prepared_databases: PreparedDatabases) -> Iterator[MakeHost]:
    """Creates host apps with the given settings, and closes their connections after the test."""
    hosts: list[Host] = []
    prepared_databases.copy_to(tmp_path / "host.db")

    def make(**options: Any) -> Host:
        hosts.append(Host(tmp_path, **options))
        return hosts[-1]

    yield make
    for host in hosts:
        host.close()


class Host:
    """A Flask app with the dashboard, and its test client."""

    def __init__(
        self,
        folder: Any,
        *,
        authorizer: Any = "all",
        app: flask.Flask | None = None,
        **config: Any,
    ) -> None:
        self.app = app or flask.Flask(__name__)
        self.app.config.update(
            SECRET_KEY="for tests",
            SQLALCHEMY_DATABASE_URI=f"sqlite:///{folder}/host.db",
            BGJOBS_ALLOWED_JOBS=[SAMPLE, RECEIPT],
        )
        self.app.config.update(config)
        self.db = new_database(self.app)
        self.bgjobs = BgJobs(self.app, self.db)
        if authorizer == "all":
            self.bgjobs.authorize_dashboard(lambda action, job: True)
        elif authorizer is not None:
            self.bgjobs.authorize_dashboard(authorizer)
        create_tables(self.app)
        self.client: FlaskClient = self.app.test_client()

    @property
    def state(self) -> Any:
        return self.app.extensions["bgjobs"]

    def close(self) -> None:
        self.state.store.dispose()
        with self.app.app_context():
            self.db.session.remove()
            for engine in self.db.engines.values():
                engine.dispose()

    def add(self, count: int = 1, **values: Any) -> int:
        """Add ``count`` jobs with these column values, and return the id of the last."""
        row = {**_DEFAULTS, "run_at": now(), "created_at": now(), **values}
        if row["status"] in FINAL:
            row.setdefault("finished_at", now())
        row = {Job.__mapper__.attrs[key].columns[0].name: value for key, value in row.items()}
        row.setdefault("claim_rank", claim_rank(row["priority"]))
        with self.state.store.engine.begin() as connection:
            connection.execute(sa.insert(Job.__table__), [dict(row) for _ in range(count)])
            return int(connection.scalar(sa.select(sa.func.max(Job.id))) or 0)

    def add_attempt(self, job_id: int, **values: Any) -> None:
        usual = {"attempt": 1, "outcome": "failed", "finished_at": now()}
        self._insert(Attempt, job_id=job_id, **usual | values)

    def add_line(self, job_id: int, message: str, attempt: int = 1) -> None:
        self._insert(JobLog, job_id=job_id, attempt=attempt, created_at=now(), message=message)

    def add_worker(self, name: str = "worker-1", **values: Any) -> None:
        self._insert(
            Worker,
            **{
                "name": name,
                "status": "alive",
                "host": "here",
                "pid": 1,
                "version": "0",
                "pool": "thread",
                "concurrency": 1,
                "beats": 0,
                "heartbeat_at": now(),
                "started_at": now(),
                **values,
            },
        )

    def pause(self, queue: str) -> None:
        self._insert(Queue, name=queue, created_at=now(), paused_at=now())

    def _insert(self, model: Any, **values: Any) -> None:
        with self.state.store.engine.begin() as connection:
            connection.execute(sa.insert(model).values(**values))

    def job(self, job_id: int) -> Job:
        """The job as it is in the database now."""
        job: Job = self.state.store.get(job_id)
        return job

    def count(self) -> int:
        with self.state.store.read() as connection:
            return int(connection.scalar(sa.select(sa.func.count()).select_from(Job)) or 0)

    def get(self, path: str, status: int = 200, **more: Any) -> str:
        """The text of a page of the dashboard. It must be answered with ``status``."""
        response = self.client.get(PREFIX + path, **more)
        assert response.status_code == status, response.text
        return response.text

    def token(self) -> str:
        """The CSRF token of this client's session."""
        found = re.search(r'name="csrf_token" value="([^"]+)"', self.get("/list"))
        assert found is not None
        return found[1]

    def post(self, path: str, **fields: Any) -> Any:
        """The response to a form with a valid token."""
        return self.client.post(PREFIX + path, data={"csrf_token": self.token(), **fields})


_DEFAULTS: dict[str, Any] = {
    "target": SAMPLE,
    "method": "execute",
    "parameters_json": '["Hello"]',
    "queue": "default",
    "priority": 0,
    "status": "pending",
    "attempt": 0,
    "retry_count": 0,
    "retries": 3,
    "retry_delay": "[5.0]",
    "backoff": "fixed",
    "jitter": 0.0,
    "suspect": False,
    "crash_count": 0,
}


def now(seconds: float = 0.0) -> dt.datetime:
    """The UTC time, or a time some seconds later, in the form that the database stores."""
    return dt.datetime.now(dt.UTC).replace(tzinfo=None) + dt.timedelta(seconds=seconds)


def listed_ids(page: str) -> list[int]:
    """The ids of the jobs in a list page, in order."""
    return [int(found) for found in re.findall(r'<tr role="row" id="job-(\d+)"', page)]
