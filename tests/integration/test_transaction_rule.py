"""The transaction rule: a job joins uncommitted writes, and otherwise is saved at once."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.session import Session as _HostSession
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from werkzeug.exceptions import UnprocessableEntity

from flask_bgjobs import (
    BgJobs,
    DatabaseUnusable,
    InvalidJob,
    Job,
    JobNotCommitted,
    job_enqueued,
    run_background_job,
)
from flask_bgjobs.enqueue import transactions
from flask_bgjobs.operations.actions import delete, pause, retry
from flask_bgjobs.state import AppState, state_of
from tests import jobs
from tests.conftest import DEADLINE_SECONDS, count_jobs, stored, wait_until
from tests.databases import END_CONNECTION, number_of


def _purchases() -> sa.Table:
    """The table of the app, in metadata of its own."""
    columns = (sa.Column("id", sa.Integer, primary_key=True), sa.Column("name", sa.String(50)))
    return sa.Table("purchase", sa.MetaData(), *columns)


_PURCHASES = _purchases()
"""For all apps without a bind key: its metadata gets our tables once."""


class Shop:
    """An app with a table, its session and the jobs announced by ``job_enqueued``."""

    def __init__(
        self, url: str, *, session_class: type[Session] = _HostSession, **config: Any
    ) -> None:
        self.app = Flask("shop")
        self.app.config.update(
            SQLALCHEMY_DATABASE_URI=url,
            BGJOBS_ALLOWED_JOBS=jobs.NAMES,
            # Its routes take longer than most tests.
            BGJOBS_DASHBOARD=False,
            SECRET_KEY="x",
            **config,
        )
        # With a bind key, our tables are in other metadata.
        table = _purchases() if "BGJOBS_BIND_KEY" in config else _PURCHASES
        self.db = SQLAlchemy(metadata=table.metadata, session_options={"class_": session_class})

        class Purchase(self.db.Model):  # type: ignore[name-defined]  # made at run time
            __table__ = table

        self.purchase = Purchase
        self.db.init_app(self.app)
        BgJobs(self.app)
        self.announced: list[int] = []
        # Blinker keeps only weak references to receivers.
        self._receiver = lambda app, job: self.announced.append(job.id)
        job_enqueued.connect(self._receiver, self.app)
        with self.app.app_context():
            self.db.create_all()

    @property
    def session(self) -> Any:
        return self.db.session

    def enqueue(self, **options: Any) -> Any:
        return run_background_job("tests.jobs.echo", parameters=[1], **options)

    def statement(self, kind: str) -> str:
        """The SQL of a statement for this database."""
        return _STATEMENTS[kind][self.db.engine.name == "mysql"]

    def exists(self, job: Any) -> bool:
        return state_of(self.app).store.get(job.id) is not None


@pytest.fixture
def shop(database_url: str) -> Any:
    shop = Shop(database_url)
    with shop.app.app_context():
        yield shop
        shop.session.remove()
    state_of(shop.app).store.dispose()
    with shop.app.app_context():
        shop.db.engine.dispose()


_WITH = "WITH x AS (SELECT name FROM purchase) "
_STATEMENTS = {
    "WITH": (
        _WITH + "INSERT INTO purchase (name) SELECT name FROM x",
        _WITH + "SELECT name FROM x",
    ),
    "unknown": ("ANALYZE", "DO 1"),
}
"""Each statement for SQLite and PostgreSQL, and for MySQL and MariaDB."""

WRITES: dict[str, Callable[[Shop], Any]] = {
    "a pending object": lambda s: s.session.add(s.purchase(name="a")),
    "a flushed row": lambda s: (s.session.add(s.purchase(name="a")), s.session.flush()),
    "Core": lambda s: s.session.execute(sa.insert(s.purchase).values(name="a")),
    "text": lambda s: s.session.execute(sa.text("INSERT INTO purchase (name) VALUES ('a')")),
    "lower-case text after a comment": lambda s: s.session.execute(
        sa.text("/* note */ insert into purchase (name) values ('a')")
    ),
    "WITH": lambda s: s.session.execute(sa.text(s.statement("WITH"))),
    "unknown text": lambda s: s.session.execute(sa.text(s.statement("unknown"))),
    "a savepoint that is released": lambda s: _in_savepoint(s),
    "a savepoint that is rolled back": lambda s: _in_savepoint(s, roll_back=True),
}


def _in_savepoint(shop: Shop, roll_back: bool = False) -> None:
    nested = shop.session.begin_nested()
    shop.session.execute(sa.insert(shop.purchase).values(name="a"))
    if roll_back:
        nested.rollback()
    else:
        nested.commit()


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
class TestUncommittedWrites:
    def test_job_is_saved_by_the_commit(self, shop: Shop, write: Callable[[Shop], Any]) -> None:
        """A job joins a session with uncommitted writes, and is saved and announced by its
        commit."""
        write(shop)
        job = shop.enqueue()
        assert not shop.exists(job)
        assert shop.announced == []
        shop.session.commit()
        assert shop.exists(job)
        assert shop.announced == [job.id]

    def test_rollback_removes_the_job(
        self, shop: Shop, write: Callable[[Shop], Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        """After a rollback, a joined job has no row and no signal, and is logged at DEBUG."""
        caplog.set_level(logging.DEBUG, "flask_bgjobs")
        write(shop)
        job = shop.enqueue()
        shop.session.rollback()
        assert count_jobs(shop.app) == 0
        assert shop.announced == []
        assert f"Job {job.id} was lost with its transaction" in caplog.text

    def test_job_after_the_commit_is_saved_at_once(
        self, shop: Shop, write: Callable[[Shop], Any]
    ) -> None:
        """After the outermost commit, the session no longer counts as having writes."""
        write(shop)
        shop.session.commit()
        assert shop.exists(shop.enqueue())


def test_job_in_clean_session_is_saved_at_once(shop: Shop) -> None:
    """Without uncommitted writes, the job is saved at once and announced."""
    job = shop.enqueue()
    assert shop.exists(job)
    assert shop.announced == [job.id]
    shop.session.rollback()
    assert shop.exists(job)


@pytest.mark.parametrize(
    "read",
    [
        lambda s: s.session.scalars(sa.select(s.purchase)).all(),
        lambda s: s.session.execute(sa.text("select 1")).all(),
        lambda s: s.session.begin_nested().commit(),
    ],
    ids=["ORM", "text", "an empty savepoint"],
)
def test_job_in_read_only_session_is_saved_at_once(shop: Shop, read: Callable[[Shop], Any]) -> None:
    """In a session that has only read, the job is saved at once and needs no commit."""
    read(shop)
    job = shop.enqueue()
    assert shop.exists(job)
    shop.session.rollback()
    assert shop.exists(job)


def test_unmodified_object_is_no_write(shop: Shop) -> None:
    """Setting an attribute to its current value is not a write."""
    shop.session.add(shop.purchase(name="a"))
    shop.session.commit()
    order = shop.session.scalars(sa.select(shop.purchase)).one()
    order.name = "a"
    assert shop.exists(shop.enqueue())


def test_modified_object_is_a_write(shop: Shop) -> None:
    """An unflushed change of a loaded object is a write."""
    shop.session.add(shop.purchase(name="a"))
    shop.session.commit()
    shop.session.scalars(sa.select(shop.purchase)).one().name = "b"
    job = shop.enqueue()
    assert not shop.exists(job)


def test_session_none_never_joins(shop: Shop) -> None:
    """With ``session=None``, the job is saved at once even if the session has writes."""
    shop.session.add(shop.purchase(name="a"))
    job = shop.enqueue(session=None)
    assert shop.exists(job)
    shop.session.rollback()
    assert shop.exists(job)


@pytest.mark.on("sqlite")
def test_session_none_beside_own_writes_is_refused(shop: Shop) -> None:
    """On SQLite, ``session=None`` beside a flushed write is refused at once, because it would wait
    for its own session."""
    shop.session.execute(sa.insert(shop.purchase).values(name="a"))
    with pytest.raises(InvalidJob, match="first, or let the job join"):
        shop.enqueue(session=None)
    shop.session.commit()
    assert shop.exists(shop.enqueue(session=None))


def test_given_session_is_always_joined(shop: Shop) -> None:
    """With ``session=``, the job joins that session, with or without writes."""
    with Session(shop.db.engine) as session:
        job = shop.enqueue(session=session)
        assert not shop.exists(job)
        session.commit()
        assert shop.exists(job)
        lost = shop.enqueue(session=session)
        session.rollback()
        assert not shop.exists(lost)
    assert shop.announced == [job.id]


def test_given_scoped_session_is_joined(shop: Shop) -> None:
    """With ``session=db.session``, the job joins that session."""
    job = shop.enqueue(session=shop.session)
    assert not shop.exists(job)
    shop.session.commit()
    assert shop.exists(job)


def test_session_of_another_database_writes_to_jobs_database(shop: Shop, tmp_path: Any) -> None:
    """If the given session is bound to another database, the job is inserted in the database of the
    job tables."""
    other = sa.create_engine(f"sqlite:///{tmp_path / 'other.db'}")
    with Session(other) as session:
        job = shop.enqueue(session=session)
        assert not shop.exists(job)
        session.commit()
    other.dispose()
    assert shop.exists(job)


def test_session_bound_to_connection_is_joined(shop: Shop) -> None:
    """A job joins a session that is bound to a connection: saving the job at once would commit that
    connection."""
    with shop.db.engine.connect() as connection, Session(connection) as session:
        job = shop.enqueue(session=session)
        assert not shop.exists(job)
        session.commit()
        connection.commit()
    assert shop.exists(job)


def test_savepoint_rollback_removes_its_job(shop: Shop) -> None:
    """A rollback to a savepoint removes the job enqueued in it, and keeps the job enqueued before
    it."""
    shop.session.execute(sa.insert(shop.purchase).values(name="a"))
    kept = shop.enqueue()
    nested = shop.session.begin_nested()
    lost = shop.enqueue()
    nested.rollback()
    shop.session.commit()
    assert shop.exists(kept)
    assert not shop.exists(lost)
    assert shop.announced == [kept.id]


def test_job_in_savepoint_is_announced_by_outermost_commit(shop: Shop) -> None:
    """``job_enqueued`` is sent after the outermost commit, not after the release of a savepoint."""
    with shop.session.begin_nested():
        shop.session.execute(sa.insert(shop.purchase).values(name="a"))
        job = shop.enqueue()
    assert shop.announced == []
    shop.session.commit()
    assert shop.announced == [job.id]


def test_released_savepoint_is_no_commit(shop: Shop) -> None:
    """``wait`` and ``refresh`` of a job that joined in a savepoint raise until the outermost
    commit, also after the release."""
    with shop.session.begin_nested():
        shop.session.execute(sa.insert(shop.purchase).values(name="a"))
        job = shop.enqueue()
    with pytest.raises(JobNotCommitted):
        job.wait(timeout=1)
    with pytest.raises(JobNotCommitted):
        job.refresh()
    shop.session.commit()
    assert job.refresh().status == "pending"


@pytest.mark.parametrize("end", ["rollback", "remove"])
def test_job_in_released_savepoint_is_lost_with_its_transaction(shop: Shop, end: str) -> None:
    """If the outer transaction is rolled back or closed after the release, a job that joined in a
    savepoint is removed and not announced."""
    # Before the savepoint: sqlite3 commits at the release of a savepoint without an outer
    # transaction.
    shop.session.execute(sa.insert(shop.purchase).values(name="a"))
    with shop.session.begin_nested():
        job = shop.enqueue()
    getattr(shop.session, end)()
    assert (count_jobs(shop.app), shop.announced) == (0, [])
    assert not job.committed


def test_closing_the_session_loses_the_job(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """If a session is closed without a commit, its job is lost, and a warning says so."""
    shop.session.add(shop.purchase(name="a"))
    job = shop.enqueue()
    shop.session.remove()
    assert count_jobs(shop.app) == 0
    assert f"Job lost | Job: {job.id} | Class: tests.jobs.echo | " in caplog.text


def test_lost_job_is_logged_after_savepoint_rollback(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing commit is logged even if a savepoint of the transaction was rolled back."""
    shop.session.add(shop.purchase(name="a"))
    job = shop.enqueue()
    shop.session.begin_nested().rollback()
    shop.session.remove()
    assert f"Job lost | Job: {job.id} | " in caplog.text


@pytest.mark.parametrize(
    ("error", "status", "config"),
    [
        (LookupError("no such customer"), 500, {"PROPAGATE_EXCEPTIONS": False}),
        (LookupError("no such customer"), 500, {"PROPAGATE_EXCEPTIONS": True}),
        (UnprocessableEntity(), 422, {}),
        (KeyError("handled"), 400, {}),
    ],
    ids=str,
)
def test_job_lost_by_an_exception_is_not_logged(
    shop: Shop, caplog: pytest.LogCaptureFixture, error: Exception, status: int, config: Any
) -> None:
    """A job lost because its request or ``with`` block raised an exception is not logged as a
    missing commit."""

    @shop.app.route("/")
    def view() -> str:
        shop.session.add(shop.purchase(name="a"))
        shop.enqueue()
        raise error

    def send_request() -> None:
        with contextlib.suppress(LookupError):
            assert shop.app.test_client().get("/").status_code == status

    def fail_in_block() -> None:
        with Session(shop.db.engine) as session:
            session.add(shop.purchase(name="a"))
            session.flush()
            run_background_job("tests.jobs.echo", session=session)
            raise LookupError

    shop.app.register_error_handler(KeyError, lambda error: ("no", 400))
    shop.app.config.update(config)
    # A request in this thread would share the test's context, and so its session.
    thread = threading.Thread(target=send_request)
    thread.start()
    thread.join()
    with pytest.raises(LookupError):
        fail_in_block()
    assert count_jobs(shop.app) == 0
    assert "Job lost" not in caplog.text


def test_missing_commit_in_exception_handler_is_logged(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing commit in an ``except`` block is logged, because the exception did not end that
    transaction."""
    shop.session.add(shop.purchase(name="a"))
    shop.enqueue()
    shop.session.commit()
    try:
        raise OSError
    except OSError:
        shop.session.add(shop.purchase(name="a"))
        job = shop.enqueue()
        shop.session.remove()
    assert f"Job lost | Job: {job.id} | " in caplog.text


@pytest.mark.on("sqlite")
def test_changes_beside_own_writes_are_refused(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """On SQLite, a change of a job beside a flushed write is refused at once, because it would wait
    for its own session until the database times out."""
    monkeypatch.setattr("flask_bgjobs.store.dialects.sqlite._BUSY_TIMEOUT_MS", 600_000)
    state_of(shop.app).store.dispose()
    job = shop.enqueue()
    shop.session.commit()
    shop.session.add(shop.purchase(name="a"))
    shop.session.flush()
    for change in (
        job.cancel,
        lambda: retry(state_of(shop.app), [job.id]),
        lambda: delete(state_of(shop.app), [job.id]),
        lambda: pause(state_of(shop.app), "default"),
    ):
        began = time.monotonic()
        with pytest.raises(DatabaseUnusable, match="commit or roll back first"):
            change()
        assert time.monotonic() - began < DEADLINE_SECONDS
    assert Job.get(job.id) is not None
    shop.session.commit()
    assert job.cancel().status == "cancelled"


def test_job_get(shop: Shop) -> None:
    """``Job.get`` returns the job with an id, ``None`` if it does not exist, and raises for
    anything but an int."""
    job = shop.enqueue()
    shop.session.commit()
    found = Job.get(job.id)
    assert found is not None
    assert (found.id, found.target, found.committed) == (job.id, "tests.jobs.echo", True)
    assert Job.get(job.id + 1) is None
    assert [Job.get(number) for number in (0, -(2**70), 2**63, 2**70)] == [None] * 4
    for no_id in (str(job.id), "abc", True, None, 1.5):
        with pytest.raises(TypeError, match="the id of a job is an int, not"):
            Job.get(no_id)  # type: ignore[arg-type]  # wrong on purpose


def test_attributes_in_queries(shop: Shop) -> None:
    """``name``, ``is_finished`` and ``is_cancelling`` can be used in queries."""
    job = shop.enqueue()
    other = run_background_job("tests.jobs.SampleJob", "execute", ["Hello"])
    shop.session.commit()

    def ids(condition: Any) -> list[int]:
        return list(shop.session.scalars(sa.select(Job.id).where(condition)))

    assert ids(Job.name == "tests.jobs.echo") == [job.id]
    assert ids(Job.name == "tests.jobs.SampleJob.execute") == [other.id]
    assert ids(Job.is_finished) == []
    shop.session.rollback()
    job.cancel()
    assert ids(Job.is_finished) == [job.id]
    assert ids(Job.is_cancelling) == []


def test_joining_flushes_the_session(shop: Shop) -> None:
    """Joining flushes the session first, so that new objects have ids to use as parameters."""
    order = shop.purchase(name="a")
    shop.session.add(order)
    shop.enqueue()
    assert order.id is not None


def test_wait_before_the_commit_raises(shop: Shop) -> None:
    """``wait`` and ``refresh`` of a joined job raise until its transaction is committed."""
    shop.session.add(shop.purchase(name="a"))
    job = shop.enqueue()
    with pytest.raises(JobNotCommitted, match="has not committed"):
        job.wait(timeout=1)
    with pytest.raises(JobNotCommitted):
        job.refresh()
    shop.session.commit()
    assert job.refresh().status == "pending"


def test_unique_key_does_not_break_the_session(shop: Shop) -> None:
    """If a ``unique_key`` is taken, enqueue returns the job that holds it, and the joined
    transaction stays usable."""
    first = shop.enqueue(unique_key="k")
    shop.session.add(shop.purchase(name="a"))
    second = shop.enqueue(unique_key="k")
    assert second.id == first.id
    assert second.deduplicated
    shop.session.commit()
    assert shop.session.scalars(sa.select(shop.purchase.name)).all() == ["a"]
    assert shop.announced == [first.id]


@pytest.mark.on("postgresql", "mysql")
@pytest.mark.parametrize("writes", [False, True])
def test_lost_connection_raises_its_own_error(shop: Shop, writes: bool) -> None:
    """If the host's connection is lost, the host gets the error of the driver, not one of
    flask-bgjobs."""
    with pytest.raises(DBAPIError):
        _lose_connection(shop, writes)


def _lose_connection(shop: Shop, writes: bool) -> None:
    engine = shop.db.engine
    with engine.connect() as connection:
        if writes:
            connection.execute(sa.insert(shop.purchase).values(name="lost"))
        with engine.connect() as other:
            other.exec_driver_sql(END_CONNECTION[engine.name].format(number_of(connection)))
        wait_until(
            lambda: connection.exec_driver_sql("SELECT 1").scalar() is None, "the lost connection"
        )


def test_every_job_in_memory_joins() -> None:
    """In-memory SQLite has one connection, so every job joins."""
    shop = Shop("sqlite://")
    with shop.app.app_context():
        lost = shop.enqueue()
        assert not lost.committed
        shop.session.rollback()
        assert shop.enqueue(session=None).committed is False
        shop.session.commit()
        assert count_jobs(shop.app) == 1


@pytest.fixture
def explicit(tmp_path: Any) -> Iterator[Shop]:
    """A shop that begins each transaction explicitly, as the SQLAlchemy documentation recommends
    for SQLite."""
    shop = Shop(f"sqlite:///{tmp_path / 'shop.db'}")
    with shop.app.app_context():
        engine = shop.db.engine
        sa.event.listen(
            engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None)
        )
        sa.event.listen(engine, "begin", lambda c: c.exec_driver_sql("BEGIN"))
        engine.dispose()
        yield shop
        shop.session.remove()
        engine.dispose()
    state_of(shop.app).store.dispose()


@pytest.mark.parametrize(
    "statement",
    ["WITH one AS (SELECT 1) SELECT * FROM one", "PRAGMA user_version", "EXPLAIN SELECT 1"],
)
def test_statements_without_a_lock_do_not_delay_changes(explicit: Shop, statement: str) -> None:
    """After a statement that locks nothing, a job can be enqueued and cancelled."""
    assert "WAL mode is now on" in str(state_of(explicit.app).store.prepare(wal=True))
    explicit.session.execute(sa.text(statement)).all()
    job = run_background_job("tests.jobs.echo", session=None)
    assert job.cancel().status == "cancelled"


def test_changes_beside_own_reads_without_wal_are_refused(explicit: Shop) -> None:
    """Without WAL, a change of a job beside an open read is refused, because a reader blocks all
    commits."""
    job = run_background_job("tests.jobs.echo", session=None)
    explicit.session.execute(sa.text("PRAGMA user_version")).all()
    for change in (job.cancel, lambda: run_background_job("tests.jobs.echo", session=None)):
        with pytest.raises((DatabaseUnusable, InvalidJob), match="open transaction"):
            change()
    explicit.session.rollback()
    assert job.cancel().status == "cancelled"


def test_failed_commit_is_rolled_back_before_the_next_try(
    explicit: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a commit failed, its transaction is rolled back, so that the next try can begin one on
    the same connection."""
    monkeypatch.setattr("flask_bgjobs.store.dialects.sqlite._BUSY_TIMEOUT_MS", 50)
    job = run_background_job("tests.jobs.echo", session=None)
    state_of(explicit.app).store.dispose()
    with explicit.db.engine.connect() as reader:
        reader.execute(sa.text("SELECT * FROM sqlite_master")).all()
        ends = threading.Timer(0.5, reader.rollback)
        ends.start()
        job.cancel()
        ends.join()
    assert stored(explicit.app, job.id).status == "cancelled"


def test_cancel_in_memory_does_not_commit_writes_of_host() -> None:
    """In memory, a cancel beside uncommitted writes is refused, because all sessions share one
    connection."""
    shop = Shop("sqlite://")
    with shop.app.app_context():
        job = shop.enqueue()
        shop.session.commit()
        shop.session.add(shop.purchase(name="a"))
        shop.session.flush()
        with pytest.raises(DatabaseUnusable, match="commit or roll back first"):
            job.cancel()
        shop.session.rollback()
        assert shop.session.query(shop.purchase).count() == 0
        shop.session.rollback()
        assert job.cancel().status == "cancelled"


def test_writes_on_another_bind_do_not_count(tmp_path: Any) -> None:
    """A write on another bind does not make the job join, because no transaction spans two
    binds."""
    shop = Shop(
        f"sqlite:///{tmp_path / 'main.db'}",
        SQLALCHEMY_BINDS={"jobs": f"sqlite:///{tmp_path / 'jobs.db'}"},
        BGJOBS_BIND_KEY="jobs",
    )
    with shop.app.app_context():
        shop.session.add(shop.purchase(name="a"))
        shop.session.flush()
        job = shop.enqueue()
        assert shop.exists(job)
        shop.session.rollback()
        assert shop.exists(job)
        with state_of(shop.app).store.read() as connection:
            tables = sa.inspect(connection).get_table_names()
        assert "purchase" not in tables
        assert "bgjobs_job" in tables


def test_given_session_joins_on_the_bind_of_the_tables(tmp_path: Any) -> None:
    """With ``session=``, the job joins through the session's connection to the bind of the job
    tables."""
    shop = Shop(
        f"sqlite:///{tmp_path / 'main.db'}",
        SQLALCHEMY_BINDS={"jobs": f"sqlite:///{tmp_path / 'jobs.db'}"},
        BGJOBS_BIND_KEY="jobs",
    )
    with shop.app.app_context():
        job = shop.enqueue(session=shop.session)
        assert not shop.exists(job)
        shop.session.commit()
        assert shop.exists(job)


def test_threads_with_open_sessions_do_not_deadlock(shop: Shop) -> None:
    """15 threads with open sessions, some with writes, enqueue jobs without a timeout."""
    barrier = threading.Barrier(15)
    failures: list[BaseException] = []

    def request(number: int) -> None:
        try:
            with shop.app.app_context():
                shop.session.scalars(sa.select(shop.purchase)).all()
                barrier.wait(timeout=30)
                for _ in range(10):
                    if number % 3 == 0:
                        shop.session.execute(sa.insert(shop.purchase).values(name="a"))
                    shop.enqueue()
                    if number % 3 == 0:
                        shop.session.commit()
                shop.session.rollback()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=request, args=[n]) for n in range(15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert count_jobs(shop.app) == 150


def test_session_at_reused_address_is_watched() -> None:
    """The writes of each session are noticed, even if it has the memory address of an earlier
    one."""
    engine = sa.create_engine("sqlite://")
    for number in range(100):
        # The session before it was freed, so that this one may get its address.
        sessions = scoped_session(sessionmaker(engine))
        transactions.watch(engine)
        sessions.execute(sa.text("CREATE TABLE IF NOT EXISTS note (id INTEGER)"))
        assert transactions.holds_writes(sessions(), engine), f"session {number}"
        sessions.remove()
        del sessions
    engine.dispose()


def test_failing_receiver_does_not_affect_the_job(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception in a signal receiver is logged; commit and job are not affected."""

    def fail(app: Flask, job: Any) -> None:
        raise RuntimeError("receiver")

    with job_enqueued.connected_to(fail, shop.app):
        shop.session.add(shop.purchase(name="a"))
        job = shop.enqueue()
        shop.session.commit()
    assert stored(shop.app, job).status == "pending"
    assert "raised; the job is not affected" in caplog.text


def test_saving_at_once_leaves_host_session_unchanged(state: AppState, app: Flask) -> None:
    """Saving a job at once does not begin a transaction in the host's session."""
    session = state.db.session()
    run_background_job("tests.jobs.echo")
    assert not session.in_transaction()


class _RoutingSession(_HostSession):
    """Reads from a replica and writes to the leader, as in the SQLAlchemy documentation."""

    def get_bind(self, mapper: Any = None, clause: Any = None, **rest: Any) -> Any:
        if rest.get("bind") is not None:
            return rest["bind"]
        is_write = self._flushing or isinstance(clause, sa.Update | sa.Delete)
        return self._db.engines[None if is_write else "replica"]


def _as_replica(url: str) -> str:
    """Another URL of the same database."""
    parsed = sa.make_url(url)
    option = {"sqlite": {"timeout": "4"}, "postgresql": {"application_name": "replica"}}
    options = option.get(parsed.get_backend_name(), {"charset": "utf8mb4"})
    return parsed.update_query_dict(options).render_as_string(hide_password=False)


@pytest.fixture
def routing(database_url: str) -> Iterator[Shop]:
    """A shop whose session reads from a replica."""
    shop = Shop(
        database_url,
        session_class=_RoutingSession,
        SQLALCHEMY_BINDS={"replica": _as_replica(database_url)},
    )
    with shop.app.app_context():
        yield shop
        shop.session.remove()
        state_of(shop.app).store.dispose()
        for engine in shop.db.engines.values():
            engine.dispose()


class TestRoutingSession:
    @pytest.mark.parametrize("flushes", [False, True])
    @pytest.mark.parametrize("explicit", [False, True])
    @pytest.mark.parametrize("commits", [False, True])
    def test_job_joins_transaction_of_the_leader(
        self, routing: Shop, flushes: bool, explicit: bool, commits: bool
    ) -> None:
        """A job joins the writes on the leader even if ``get_bind`` returns a replica outside a
        flush."""
        routing.session.scalars(sa.select(routing.purchase)).all()
        routing.session.rollback()
        routing.session.add(routing.purchase(name="a"))
        if flushes:
            routing.session.flush()
        job = routing.enqueue(**({"session": routing.session} if explicit else {}))
        assert not routing.exists(job)
        (routing.session.commit if commits else routing.session.rollback)()
        assert routing.exists(job) is commits

    def test_job_without_writes_is_saved_at_once(self, routing: Shop) -> None:
        """A job does not join a session that has only read from the replica."""
        routing.session.scalars(sa.select(routing.purchase)).all()
        assert routing.exists(routing.enqueue())

    def test_writes_through_another_engine_count(self, shop: Shop) -> None:
        """A job joins writes that use another engine of the same database."""
        leader = sa.create_engine(shop.db.engine.url)
        with Session(leader) as session:
            shop.db.session = scoped_session(lambda: session)
            session.add(shop.purchase(name="a"))
            session.flush()
            job = shop.enqueue()
            assert not shop.exists(job)
            session.rollback()
            assert not shop.exists(job)
        leader.dispose()


FLUSH_EVENTS = ("before_flush", "after_flush", "after_flush_postexec")
MAPPER_EVENTS = ("before_insert", "after_insert", "before_update", "after_update", "after_delete")
JOINS = (*FLUSH_EVENTS, *MAPPER_EVENTS, "before_commit")
"""Events in which there is a transaction that a job can join."""


def _listen_once(shop: Shop, event: str, enqueue: Callable[[], Any]) -> list[Any]:
    """Enqueue a job at the first occurrence of an event. The list then contains the job."""
    enqueued: list[Any] = []

    def listener(*_: object) -> None:
        if not enqueued:
            enqueued.append(None)
            enqueued[0] = enqueue()

    target = shop.purchase if event in MAPPER_EVENTS else shop.session
    sa.event.listen(target, event, listener)
    return enqueued


def _prepare_change(shop: Shop, event: str) -> None:
    """Leave the session with a change whose commit triggers the event."""
    bought = shop.purchase(name="a")
    shop.session.add(bought)
    if event.endswith(("_update", "_delete")):
        shop.session.commit()
        if event.endswith("_delete"):
            shop.session.delete(bought)
        else:
            bought.name = "b"


class TestSessionEvents:
    @pytest.mark.parametrize("event", JOINS)
    @pytest.mark.parametrize("explicit", [False, True])
    def test_job_in_a_flush_joins_its_transaction(
        self, shop: Shop, event: str, explicit: bool
    ) -> None:
        """A job enqueued during a flush or before a commit joins the transaction, and the commit
        succeeds."""
        options = {"session": shop.session} if explicit else {}
        _prepare_change(shop, event)
        enqueued = _listen_once(shop, event, lambda: shop.enqueue(**options))
        shop.session.flush()
        if event != "before_commit":
            assert not enqueued[0].committed
        shop.session.commit()
        (job,) = enqueued
        assert shop.exists(job)
        assert job.committed
        assert shop.announced == [job.id]

    @pytest.mark.parametrize("event", FLUSH_EVENTS + MAPPER_EVENTS)
    def test_rollback_removes_job_of_a_flush(self, shop: Shop, event: str) -> None:
        """A rollback removes a job that was enqueued during a flush."""
        _prepare_change(shop, event)
        enqueued = _listen_once(shop, event, shop.enqueue)
        shop.session.flush()
        shop.session.rollback()
        assert not shop.exists(enqueued[0])
        assert shop.announced == []

    @pytest.mark.parametrize("event", ["after_commit", "after_transaction_end"])
    @pytest.mark.parametrize("explicit", [False, True])
    def test_job_in_after_commit_is_saved_at_once(
        self, shop: Shop, event: str, explicit: bool
    ) -> None:
        """In ``after_commit``, the job has no transaction to join and is saved at once."""
        options = {"session": shop.session} if explicit and event == "after_commit" else {}
        shop.session.add(shop.purchase(name="a"))
        shop.session.flush()
        enqueued = _listen_once(shop, event, lambda: shop.enqueue(**options))
        shop.session.commit()
        shop.session.rollback()
        (job,) = enqueued
        if event == "after_commit":
            assert shop.exists(job)
            assert shop.announced == [job.id]

    @pytest.mark.parametrize("flushed", [False, True])
    def test_job_in_after_rollback_is_saved_at_once(self, shop: Shop, flushed: bool) -> None:
        """In ``after_rollback``, the job is saved at once, with and without unflushed objects."""
        shop.session.add(shop.purchase(name="a"))
        if flushed:
            shop.session.flush()
        else:
            shop.session.connection()
        enqueued = _listen_once(shop, "after_rollback", shop.enqueue)
        shop.session.rollback()
        assert shop.exists(enqueued[0])

    def test_given_session_in_after_rollback_is_refused(self, shop: Shop) -> None:
        """In ``after_rollback``, ``session=`` is refused, and the error says to pass
        ``session=None``."""
        refused: list[BaseException] = []

        def enqueue() -> None:
            with pytest.raises(InvalidJob, match="pass session=None") as caught:
                shop.enqueue(session=shop.session)
            refused.append(caught.value)

        shop.session.add(shop.purchase(name="a"))
        shop.session.flush()
        _listen_once(shop, "after_rollback", enqueue)
        shop.session.rollback()
        assert refused
        assert count_jobs(shop.app) == 0

    def test_job_after_a_failed_flush_is_saved_at_once(self, shop: Shop) -> None:
        """A failed flush rolls back; a job enqueued then is saved at once, and the session stays
        usable."""
        shop.session.add(shop.purchase(id=1, name="a"))
        shop.session.commit()
        shop.session.add(shop.purchase(id=1, name="b"))
        enqueued = _listen_once(shop, "after_rollback", shop.enqueue)
        with pytest.raises(DBAPIError):
            shop.session.flush()
        shop.session.rollback()
        assert shop.exists(enqueued[0])

    @pytest.mark.parametrize("event", ["after_commit", "after_rollback"])
    @pytest.mark.parametrize("commits", [False, True])
    def test_job_at_the_end_of_a_savepoint_joins_outer_transaction(
        self, shop: Shop, event: str, commits: bool
    ) -> None:
        """A job enqueued at the end of a savepoint joins the outer transaction."""
        shop.session.add(shop.purchase(name="a"))
        shop.session.flush()
        nested = shop.session.begin_nested()
        shop.session.add(shop.purchase(name="b"))
        shop.session.flush()
        enqueued = _listen_once(shop, event, shop.enqueue)
        (nested.commit if event == "after_commit" else nested.rollback)()
        (job,) = enqueued
        assert not job.committed
        (shop.session.commit if commits else shop.session.rollback)()
        assert shop.exists(job) is commits
        assert shop.announced == [job.id] * commits

    def test_receiver_of_job_enqueued_can_enqueue(self, shop: Shop) -> None:
        """A receiver of ``job_enqueued`` can enqueue another job after the commit."""
        second: list[Any] = []

        def receiver(_app: Flask, job: Any) -> None:
            if not second:
                second.append(None)
                second[0] = shop.enqueue()

        with job_enqueued.connected_to(receiver, shop.app):
            shop.session.add(shop.purchase(name="a"))
            first = shop.enqueue()
            shop.session.commit()
        shop.session.commit()
        assert shop.exists(first)
        assert shop.exists(second[0])


class TestSessionEventsInMemory(TestSessionEvents):
    """The same tests on a database with a single connection."""

    @pytest.fixture
    def shop(self) -> Iterator[Shop]:
        shop = Shop("sqlite://")
        with shop.app.app_context():
            yield shop
            shop.session.remove()
            shop.db.engine.dispose()


@pytest.mark.on("postgresql")
def test_binds_of_one_url_with_different_schemas(empty_database_url: str) -> None:
    """Beside a write on the host's bind, a job is saved in the schema of its own bind."""

    def bind_to(schema: str) -> dict[str, Any]:
        return {
            "url": empty_database_url,
            "connect_args": {"options": f"-csearch_path={schema}"},
        }

    engine = sa.create_engine(empty_database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE SCHEMA jobs")
    shop = Shop(
        empty_database_url,
        SQLALCHEMY_BINDS={"jobs": bind_to("jobs")},
        BGJOBS_BIND_KEY="jobs",
    )
    with shop.app.app_context():
        shop.session.add(shop.purchase(name="a"))
        shop.session.flush()
        job = shop.enqueue()
        shop.session.commit()
        with engine.connect() as connection:
            found = connection.exec_driver_sql("SELECT id FROM jobs.bgjobs_job").scalars().all()
        assert found == [job.id]
        for each in (engine, *shop.db.engines.values()):
            each.dispose()
    state_of(shop.app).store.dispose()


@pytest.mark.on("postgresql")
def test_binds_of_one_url_with_other_differences(empty_database_url: str) -> None:
    """If two binds have the same schema and differ in other options, a job joins the transaction of
    the host's bind."""
    bind = {
        "url": empty_database_url,
        "connect_args": {"options": "-c statement_timeout=60000"},
    }
    with pytest.warns(UserWarning, match="would drop the tables"):
        shop = Shop(empty_database_url, SQLALCHEMY_BINDS={"jobs": bind}, BGJOBS_BIND_KEY="jobs")
    with shop.app.app_context():
        shop.session.add(shop.purchase(name="a"))
        job = shop.enqueue()
        shop.session.rollback()
        assert not shop.exists(job)
        for each in shop.db.engines.values():
            each.dispose()
    state_of(shop.app).store.dispose()


def test_two_binds_in_memory_are_two_databases() -> None:
    """Beside a write on the host's bind, a job is saved in the in-memory bind with the job
    tables."""
    shop = Shop("sqlite://", SQLALCHEMY_BINDS={"jobs": "sqlite://"}, BGJOBS_BIND_KEY="jobs")
    with shop.app.app_context():
        shop.session.add(shop.purchase(name="a"))
        shop.session.flush()
        job = shop.enqueue()
        shop.session.commit()
        assert shop.exists(job)
        for engine in shop.db.engines.values():
            engine.dispose()
    state_of(shop.app).store.dispose()
