"""A former primary server, and a database user without a right."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_bgjobs import run_background_job
from flask_bgjobs.models import Worker as WorkerRow
from flask_bgjobs.state import AppState, state_of
from flask_bgjobs.store import Store
from flask_bgjobs.worker.registration import register
from tests.conftest import stored, wait_until
from tests.integration.test_redo import RAISE
from tests.integration.test_worker import running_worker

pytestmark = pytest.mark.on("postgresql", "mysql")

NO_WRITES = {
    "postgresql": "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "mysql": "SET SESSION TRANSACTION READ ONLY",
}
"""Makes a session refuse writes, as after a failover."""
RIGHTS = {
    "postgresql": (
        "CREATE ROLE {user} LOGIN",
        "GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO {user}",
        "GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {user}",
    ),
    "mysql": ("CREATE USER {user}", "GRANT SELECT, INSERT, UPDATE ON {database}.* TO {user}"),
}
NO_USER = {
    "postgresql": ("DROP OWNED BY {user}", "DROP ROLE {user}"),
    "mysql": ("DROP USER {user}",),
}
DENIED = {"postgresql": "42501", "mysql": 1142}


@pytest.fixture
def demoted_store(state: AppState, database_kind: str) -> Store:
    """A worker's store whose idle connections lead to a server that refuses writes."""
    store = state.store.with_deadline(60.0)
    idle = [store.engine.connect() for _ in range(2)]
    for connection in idle:
        connection.exec_driver_sql(NO_WRITES[database_kind])
        connection.commit()
    for connection in idle:
        connection.close()
    return store


def test_connections_to_a_former_primary_are_discarded(
    state: AppState, demoted_store: Store
) -> None:
    """A transaction refused by a former primary is redone on a new connection, which leads to the
    new primary."""
    worker = register(state, "one")
    change = sa.update(WorkerRow).values(name="other")
    demoted_store.transaction(lambda connection: connection.execute(change))
    # The second idle connection has been discarded as well.
    assert all(demoted_store.beat(worker) for _ in range(3))
    demoted_store.dispose()


def test_heartbeat_leaves_former_primary(state: AppState, demoted_store: Store) -> None:
    """A heartbeat, which is a single statement, is redone on a new connection."""
    assert demoted_store.beat(register(state, "one"))
    demoted_store.dispose()


def test_refused_enqueue_is_not_in_doubt(app: Flask, state: AppState, database_kind: str) -> None:
    """An enqueue refused by a former primary had no effect, so it is redone on a new connection."""
    with state.store.engine.connect() as connection:
        connection.exec_driver_sql(NO_WRITES[database_kind])
        connection.commit()
    job = run_background_job("tests.jobs.echo", session=None)
    assert stored(app, job).status == "pending"


@pytest.mark.on("mysql")
@pytest.mark.parametrize(
    ("number", "text", "ends"),
    [(1290, "the --read-only option", True), (1290, "the --other option", False), (1836, "", True)],
)
def test_error_numbers_of_a_read_only_server(
    state: AppState, number: int, text: str, ends: bool
) -> None:
    """Only errors of a read-only server invalidate the connection."""
    signal = RAISE["mysql"].format(number).replace("not now", text)
    with state.store.engine.connect() as connection:
        with pytest.raises(sa.exc.DBAPIError):
            connection.exec_driver_sql(signal)
        assert connection.invalidated is ends


@pytest.fixture
def restricted_url(database_url: str, database_kind: str, make_app: Any) -> Iterator[str]:
    """The URL of the database for a user without the DELETE right."""
    with make_app().app_context():
        pass
    user = f"bgjobs_{uuid.uuid4().hex[:12]}"
    url = sa.make_url(database_url)
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)

    def execute(statements: tuple[str, ...]) -> None:
        with engine.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement.format(user=user, database=url.database))

    execute(RIGHTS[database_kind])
    try:
        yield url.set(username=user).render_as_string(hide_password=False)
    finally:
        execute(NO_USER[database_kind])


def test_worker_without_delete_right_continues(
    make_app: Callable[..., Flask],
    restricted_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without the DELETE right, pruning logs once what to grant, and the worker continues."""
    monkeypatch.setattr("flask_bgjobs.worker.worker._PRUNE_INTERVAL_SECONDS", 0.2)
    app = make_app(
        database_url=restricted_url,
        BGJOBS_RETENTION={"completed": 0.001, "failed": None, "cancelled": None},
    )
    with app.app_context():
        first = run_background_job("tests.jobs.echo")
        with running_worker(app):
            first.wait(60)
            wait_until(lambda: "Pruning not allowed" in caplog.text, "the warning")
            assert run_background_job("tests.jobs.echo").wait(60).status == "completed"
        assert "DELETE" in caplog.text
        assert "Database not usable" not in caplog.text
        assert state_of(app).store.get(first.id) is not None


def test_worker_without_right_for_charts_continues(
    app: Flask,
    state: AppState,
    database_kind: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without the right to write the numbers of the charts, a worker logs it once and continues."""

    def refuse(store: Store, _counts: object) -> None:
        denied = RAISE[database_kind].format(DENIED[database_kind])
        store.transaction(lambda connection: connection.exec_driver_sql(denied))

    monkeypatch.setattr(type(state.store), "add_to_rollup", refuse)
    monkeypatch.setattr("flask_bgjobs.worker.rollup.INTERVAL_SECONDS", 0.0)
    with running_worker(app):
        for _ in range(3):
            assert run_background_job("tests.jobs.echo").wait(60).status == "completed"
    assert caplog.text.count("Charts not drawn") == 1
    assert "Database not usable" not in caplog.text


def test_change_without_database_right_is_403(
    make_app: Callable[..., Flask], restricted_url: str
) -> None:
    """If the database user lacks the right for a change, the API answers 403."""
    app = make_app(database_url=restricted_url, BGJOBS_DASHBOARD=True, SECRET_KEY="for tests")
    with app.app_context():
        state = state_of(app)
        state.find_authorizer = lambda: lambda action, job: True
        job = run_background_job("tests.jobs.echo")
        assert job.cancel()
        client = app.test_client()
        token = client.get("/jobs/api/v1/jobs").headers["X-CSRFToken"]
        response = client.post(f"/jobs/api/v1/jobs/{job.id}/delete", headers={"X-CSRFToken": token})
        assert response.status_code == 403
        assert "database user lacks the right" in response.json["error"]["message"]
        assert state.store.get(job.id) is not None
